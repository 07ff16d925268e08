"""The commands of `dsdistill`, one module each, and the parts that they are assembled from."""
