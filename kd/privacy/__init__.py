"""Labels by noisy votes of teachers that saw private images, and what they cost: PATE."""
