"""The values of every run: one folder a config group. The types are in `replace/config.py`."""
