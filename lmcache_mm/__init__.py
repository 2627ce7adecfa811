"""KV-cache reuse for multimodal language models: exact content keys and fast paged copies."""

from importlib.util import find_spec

if find_spec("lmcache_mm._C") is None:
    raise ImportError(
        f"lmcache_mm: {__path__[0]} has no compiled module. If this is a clone and you ran `pip install .`, run Python "
        "in another folder, or run `pip install -e .` in the clone."
    )

from lmcache_mm import _C, ops
from lmcache_mm.cache import KVCache
from lmcache_mm.encoder_cache import EncoderCache
from lmcache_mm.job import Job
from lmcache_mm.layout import KVLayout
from lmcache_mm.prompt import Item, Namespace, Prompt
from lmcache_mm.state_cache import StateCache

__version__ = "0.1.0" + (f"+cu{''.join(_C.cuda_version.split('.')[:2])}" if _C.cuda_version else "+cpu")

__all__ = [
    "EncoderCache",
    "Item",
    "Job",
    "KVCache",
    "KVLayout",
    "Namespace",
    "Prompt",
    "StateCache",
    "__version__",
    "ops",
]
