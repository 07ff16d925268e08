"""What both frameworks share: data, the distilled-set file, the evaluation. NumPy only."""
