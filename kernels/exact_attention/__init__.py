"""Softmax attention over a bounded set of keys: sinks, retained pairs and the window."""
