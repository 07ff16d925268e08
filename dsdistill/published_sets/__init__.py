"""Read distilled sets of other projects: their files, and the meaning of their numbers."""
