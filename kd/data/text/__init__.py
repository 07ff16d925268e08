"""Text to train on: files, their columns, tokens and batches."""
