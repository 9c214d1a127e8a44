"""The three distillation stages: transfer, new layers, full model."""
