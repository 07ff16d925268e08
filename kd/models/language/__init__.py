"""Networks of texts: built in, from Hugging Face, and with fewer blocks."""
