"""Distillation losses as pure functions of logits and features."""
