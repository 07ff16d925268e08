"""Several processes: precision, sharded weights, and the notice that one has died."""
