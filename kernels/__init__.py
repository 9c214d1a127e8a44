"""The attention operators: for each a token-by-token reference and a chunked form that must equal it.

Imports torch alone, and nothing heavy on import: transformers probes the name `kernels` while it is being
imported.
"""
