"""Distilled sets of other projects: their files, and what the numbers in them mean."""
