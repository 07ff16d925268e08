"""Batches: from arrays and from files, augmented, with the teachers' outputs that are known."""
