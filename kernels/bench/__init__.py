"""Measures the kernels on a GPU against what a user would pick instead. `python -m fluxc.kernels.bench`."""
