"""`python -m replace.doctor`: what this machine and its packages can do, and what mends them.

It must say something whatever is broken. So the command itself needs the standard library only; everything
that could fail at import, hang or end the process is asked in a process of its own (`probes`).
"""
