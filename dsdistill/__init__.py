"""Dataset distillation with neural tangent kernels: many images in, a few out."""
