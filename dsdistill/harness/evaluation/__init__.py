"""The evaluation protocol: learners, controls, held-out images, metrics and statistics."""
