"""Measures the kernels against what a user would pick instead: `fluxc bench kernels`."""
