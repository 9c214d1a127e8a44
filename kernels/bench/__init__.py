"""`python -m kernels.bench`: how fast the operators are, beside others in the same run, if they are right."""
