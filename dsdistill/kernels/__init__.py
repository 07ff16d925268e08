"""Neural tangent kernels of infinitely wide networks, and their evaluation in tiles."""
