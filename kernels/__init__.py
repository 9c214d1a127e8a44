"""The attention operators: for each a token-by-token reference and a chunked form that must equal it.

Torch is all that is imported, because transformers probes the name `kernels` while it is being imported.
"""
