"""Shared by both packages: data, the distilled-set file, the evaluation. NumPy only."""
