"""What both frameworks share: data sets, preprocessing, the distilled-set file, the evaluation. NumPy only."""
