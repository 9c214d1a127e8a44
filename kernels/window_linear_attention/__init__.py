"""An exact window, sinks and a linear sum over everything older, under one denominator."""
