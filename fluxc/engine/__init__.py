"""The engine: prefill, decode and further turns over a paged KV cache. Importing it imports no torch."""
