"""A storage backend for SGLang's hierarchical cache (HiCache)."""

from lmcache_mm.sglang.backend import HiCacheBackend

__all__ = ["HiCacheBackend"]
