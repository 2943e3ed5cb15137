"""Attention over paged KV: one contract (`base`), several backends."""

from nanopd_lab.attention.base import AttentionBackend, AttentionMetadata
from nanopd_lab.attention.registry import create_backend

__all__ = ["AttentionBackend", "AttentionMetadata", "create_backend"]
