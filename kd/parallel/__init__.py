"""Several processes: devices and precision, sharded weights, and detection of dead processes."""
