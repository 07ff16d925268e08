"""Batches from arrays and from files: augmented, with teachers' logits where these are known."""
