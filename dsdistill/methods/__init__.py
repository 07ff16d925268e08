"""Kernel Inducing Points and Label Solve: their steps, losses, targets and initial supports."""
