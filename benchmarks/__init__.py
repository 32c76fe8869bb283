"""Measures of Graftage against other clients, and of how its cost grows; `python -m benchmarks --help`."""
