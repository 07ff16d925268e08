"""Students whose weights and activations are numbers of a few bits."""
