"""Data sets, folders of images, their preprocessing, and distilled sets as files."""
