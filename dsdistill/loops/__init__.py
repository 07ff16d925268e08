"""Runs of KIP and Label Solve from start to end: steps, validation, checkpoints, duration."""
