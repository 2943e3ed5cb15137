"""Attention over paged KV: one contract (`base`), several backends."""

from nanopd_lab.attention.base import AttentionBackend, AttentionMetadata
from nanopd_lab.attention.registry import check_backend, create_backend

__all__ = ["AttentionBackend", "AttentionMetadata", "check_backend", "create_backend"]
