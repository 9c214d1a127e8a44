"""The gated delta rule (Yang et al. 2024) with a scaled step in place of unit-norm keys."""
