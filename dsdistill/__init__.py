"""Dataset distillation with neural tangent kernels: an image data set in, a few synthetic images out."""
