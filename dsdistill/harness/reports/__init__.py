"""The report of an evaluation: JSON, Markdown, one HTML page, plots."""
