"""What a training minimises: schemes, terms of a loss, projectors, and taps on layers."""
