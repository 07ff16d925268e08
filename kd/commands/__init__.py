"""The commands of `kd`, one module each, and the parts that they are assembled from."""
