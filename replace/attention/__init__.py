"""One file a variant: a new one is found by its `VARIANTS.register` line, and nothing else needs an edit."""
