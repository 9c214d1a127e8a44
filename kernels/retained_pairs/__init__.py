"""The choice of a bounded number of exact key-value pairs by score, as blocks leave the window."""
