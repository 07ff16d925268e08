"""Images that are made from a trained network alone, for a student to learn from."""
