"""Kernel Inducing Points, Label Solve and what they consist of: one step, its loss, its start."""
