"""The exact neural tangent kernel of convolutional ReLU networks; `conv_kernel` is the door."""
