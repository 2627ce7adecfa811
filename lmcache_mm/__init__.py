"""KV-cache reuse for multimodal language models: exact content keys and fast paged copies."""

from lmcache_mm import ops
from lmcache_mm.cache import KVCache
from lmcache_mm.encoder_cache import EncoderCache
from lmcache_mm.layout import KVLayout
from lmcache_mm.prompt import Item, Namespace, Prompt

__all__ = ["EncoderCache", "Item", "KVCache", "KVLayout", "Namespace", "Prompt", "ops"]
