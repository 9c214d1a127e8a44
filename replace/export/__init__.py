"""A swapped model as a folder that loads where this project is not installed, and the way back."""
