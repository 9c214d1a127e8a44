"""What is measured, one file an operator: its inputs, who computes it, what it costs at the least."""
