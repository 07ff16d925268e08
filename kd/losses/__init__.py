"""Losses as pure functions: float32 inside, batch mean, no gradient into a teacher."""
