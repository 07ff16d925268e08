"""Training objectives: schemes, terms of a loss, projectors, and taps on layers."""
