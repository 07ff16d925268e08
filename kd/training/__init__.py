"""The training loop: steps, optimizer, checkpoints, and when they are written."""
