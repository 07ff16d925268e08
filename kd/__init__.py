"""Knowledge distillation: a small student learns from a large teacher, on real or on distilled images."""
