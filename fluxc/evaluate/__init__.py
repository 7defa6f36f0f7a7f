"""Evaluation: suites of prompts with exact scoring rules, every routing beside its controls, results that resume."""

from __future__ import annotations
