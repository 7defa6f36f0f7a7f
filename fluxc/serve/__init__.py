"""Serving: an engine behind an OpenAI-compatible HTTP interface, on one machine or on Ray Serve."""
