"""StateCache: the states of recurrent layers, as of Mamba or linear attention, under the keys of prompts' prefixes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from blake3 import blake3

from lmcache_mm import ops
from lmcache_mm.cache import record_key
from lmcache_mm.job import Job
from lmcache_mm.layout import KVLayout
from lmcache_mm.prompt import Namespace, Prompt, count, owner_of, owner_to_forget
from lmcache_mm.stores import open_store
from lmcache_mm.stores.arguments import unless_lacking
from lmcache_mm.stores.store import Store
from lmcache_mm.transfer import Chunk, Transfer

LAYOUT_CONTEXT = "lmcache_mm v1 state layout"


class StateCache:
    """Reuse of states across prompts, through a store; beside a KVCache for the attention layers, if there are any.

    layout: an opaque one, a page of which is one state, of all layers. Where a layer's state consists of several
    tensors, these are views of its page's bytes. store: as of KVCache, which may share it. namespace: everything beside
    prompt and layout that decides the bytes of a state; say in it what the tensors of a page are. every_tokens: at
    multiples of it, and at the ends of the prompt, its items and turns, `match` looks for states.

    A state's bytes may also depend on how the tokens before it were cut into steps: what is retrieved is what was
    stored first. Methods may be called from several threads; RuntimeError after `close`.
    """

    def __init__(
        self, layout: KVLayout, store: str | Sequence[str] | Store, namespace: Namespace, every_tokens: int = 256
    ) -> None:
        for name, value, kind in (("layout", layout, KVLayout), ("namespace", namespace, Namespace)):
            if not isinstance(value, kind):
                raise TypeError(f"{name}: expected lmcache_mm.{kind.__name__}, got {type(value).__name__}")
        if not layout.opaque:
            raise ValueError("layout: expected opaque pages, got pages of tokens")
        self._every = count("every_tokens", every_tokens)
        if not self._every:
            raise ValueError("every_tokens: expected at least 1, got 0")
        self.layout = layout
        # Not the fingerprint itself, which a KVCache of equal pages has too.
        of_states = blake3(layout.fingerprint(layout.page_tokens), derive_key_context=LAYOUT_CONTEXT).digest()
        self._namespace = namespace.with_layout(of_states)
        self._open = True
        self._owns_store = isinstance(store, Sequence)
        self.backend = open_store(store) if isinstance(store, Sequence) else store
        self._transfer = Transfer(layout, self.backend, layout.payload_bytes(1))

    def close(self) -> None:
        """Finishes all jobs, then closes the store if this cache opened it."""
        self._open = False
        self._transfer.close()
        if self._owns_store:
            self._owns_store = False
            self.backend.close()

    def __enter__(self) -> StateCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def match(self, prompt: Prompt, limit: int | None = None) -> int:
        """The most tokens, at most `limit`, behind which the store has a state of `prompt`; 0 if there is none. limit:
        what a KVCache has matched, or less; None: all but the last token, which is computed for its logits."""
        limit = len(prompt) - 1 if limit is None else min(count("limit", limit), len(prompt))
        cuts = [cut for cut in prompt.cuts(self._every, turns=True) if cut <= limit]
        present = unless_lacking(lambda: self.backend.contains(self._keys(prompt, cuts), peek=True), list[bool]())
        return max((cut for cut, there in zip(cuts, present, strict=False) if there), default=0)

    def retrieve(self, prompt: Prompt, tokens: int, page: int) -> Job[bool]:
        """Fills the page with the state behind the first `tokens` tokens. The result: whether it was there, and was
        verified; if not, the page is garbage. ValueError for a page or a number of tokens that do not exist."""
        job = self._transfer.load([self._chunk(prompt, tokens, page)], owner_of(prompt.salt))
        return job.then(bool)

    def store(self, prompt: Prompt, tokens: int, page: int) -> Job[bool]:
        """Stores the page as the state behind the first `tokens` tokens, if the store has none: a multiple of
        `every_tokens`, or an end of the prompt, its items or turns, else nothing will match it. The result: whether a
        store of this host holds it now and did not before, or whether it was handed to one beyond it. ValueError as of
        `retrieve`."""
        job = self._transfer.store([self._chunk(prompt, tokens, page)], owner_of(prompt.salt))
        return job.then(bool)

    def forget(self, salt: str | bytes) -> int:
        """Removes all records that were stored under a tenant's salt from the store; returns their number."""
        return self.backend.forget(owner_to_forget(salt))

    def _chunk(self, prompt: Prompt, tokens: int, page: int) -> Chunk:
        if not 0 < count("tokens", tokens) <= len(prompt):
            raise ValueError(f"tokens: expected 1 to {len(prompt)}, the prompt's length, got {tokens}")
        if count("page", page) >= self.layout.num_pages:
            raise ValueError(f"page: expected less than {self.layout.num_pages}, got {page}")
        (key,) = self._keys(prompt, [tokens])
        return Chunk(key, torch.tensor([page]), self.layout.page_tokens)

    def _keys(self, prompt: Prompt, cuts: Sequence[int]) -> list[bytes]:
        if not self._open:
            raise RuntimeError("cache: it is closed")
        if not cuts:
            return []
        root = self._namespace.root(prompt.salt, prompt.lora, prompt.prompt_embeds)
        keys = ops.prefix_keys(prompt.token_ids, prompt.items, root, cuts).numpy()
        return [record_key(key.tobytes()) for key in keys]
