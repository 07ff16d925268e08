"""Finished runs of trainings: their data, options and figures, and what compares them."""
