"""Honest measurement: perplexity, recall outside the window with its ablations, probes, the report."""
