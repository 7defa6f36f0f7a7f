"""The report: figures drawn from stored results, as one page that needs no network."""

from __future__ import annotations
