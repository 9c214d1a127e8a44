"""One file an attention variant. A new file here is found by its `VARIANTS.register` line; nothing else
needs an edit.
"""
