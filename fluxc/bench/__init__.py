"""Benchmarks: committed commands whose JSON is committed with the numbers the README shows."""
