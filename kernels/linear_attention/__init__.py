"""Causal linear attention on feature-mapped queries and keys, with a state of sums."""
