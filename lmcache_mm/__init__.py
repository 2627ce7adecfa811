"""KV-cache reuse for multimodal language models: exact content keys and fast paged copies."""

from lmcache_mm import ops
from lmcache_mm.cache import KVCache
from lmcache_mm.layout import KVLayout
from lmcache_mm.prompt import Item, Namespace, Prompt

__all__ = ["Item", "KVCache", "KVLayout", "Namespace", "Prompt", "ops"]
