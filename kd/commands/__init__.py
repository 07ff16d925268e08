"""The commands of `kd`, one module each, and the kinds of an evaluation."""
