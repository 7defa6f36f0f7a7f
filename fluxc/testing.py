"""What the tests of all parts share: tiny models and helpers for exported programs. Nothing else imports this."""

from __future__ import annotations

from fluxc.tiny_models import TINY_FAMILIES, tiny_llama, tiny_llama_rope

__all__ = ["TINY_FAMILIES", "tiny_llama", "tiny_llama_rope"]
