"""StateCache: stores states of recurrent layers (Mamba, linear attention) under the keys of prompts' prefixes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from blake3 import blake3

from lmcache_mm import ops
from lmcache_mm.base_cache import BaseCache
from lmcache_mm.cache import check_room, record_key
from lmcache_mm.job import Job
from lmcache_mm.layout import KVLayout
from lmcache_mm.payloads import Chunk
from lmcache_mm.prompt import Namespace, Prompt, checked_prompt, count, owner_of
from lmcache_mm.stores.arguments import unless_lacking
from lmcache_mm.stores.store import Store
from lmcache_mm.transfer import Transfer

LAYOUT_CONTEXT = "lmcache_mm v1 state layout"


class StateCache(BaseCache):
    """Reuse of states across prompts, through a store. Use it together with a KVCache if there are attention layers.

    layout: an opaque layout, with one state of all layers per page. If a layer's state consists of several tensors,
    they are views of its page's bytes. store: as in KVCache, which may share it; the attribute `backend` is the open
    store. namespace: everything besides prompt and layout that determines the bytes of a state; name the tensors of a
    page in it. every_tokens: `match` looks for states at multiples of it, and at the ends of the prompt, its items and
    turns.

    A state's bytes may also depend on how the tokens before it were split into steps: `retrieve` restores the state
    that was stored first. Several threads may call methods; RuntimeError after `close`.
    """

    def __init__(
        self, layout: KVLayout, store: str | Sequence[str] | Store, namespace: Namespace, every_tokens: int = 256
    ) -> None:
        for name, value, kind in (("layout", layout, KVLayout), ("namespace", namespace, Namespace)):
            if not isinstance(value, kind):
                raise TypeError(f"{name}: expected lmcache_mm.{kind.__name__}, got {type(value).__name__}")
        if not layout.opaque:
            raise ValueError("layout: expected opaque pages (KVLayout with opaque=True), got pages of tokens")
        self._every = count("every_tokens", every_tokens)
        if not self._every:
            raise ValueError("every_tokens: expected at least 1, got 0")
        self.layout = layout
        # The fingerprint itself would collide with that of a KVCache with equal pages.
        of_states = blake3(layout.fingerprint(layout.page_tokens), derive_key_context=LAYOUT_CONTEXT).digest()
        self._namespace = namespace.with_layout(of_states)
        super().__init__(store, "states", "restored_states", "stored_states")
        try:
            check_room(self.backend, "state", layout.payload_bytes(1))
            self._transfer = Transfer(layout, self.backend, layout.payload_bytes(1))
        except BaseException:
            super().close()
            raise

    def close(self) -> None:
        """Finishes all jobs, then closes the store if this cache opened it."""
        self._open = False
        self._transfer.close()
        super().close()

    def match(self, prompt: Prompt, limit: int | None = None) -> int:
        """The most tokens of `prompt`, at most `limit`, after which the store has a state; 0 if there is none. limit:
        what a KVCache has matched, or less; None: all but the last token, which must be computed for its logits."""
        checked_prompt(prompt)
        limit = len(prompt) - 1 if limit is None else min(count("limit", limit), len(prompt))
        cuts = [cut for cut in prompt.cuts(self._every, turns=True) if cut <= limit]
        present = unless_lacking(lambda: self.backend.contains(self._keys(prompt, cuts), peek=True), list[bool]())
        hit = max((cut for cut, there in zip(cuts, present, strict=False) if there), default=0)
        self._count(queried_states=1, hit_states=hit > 0)
        return hit

    def retrieve(self, prompt: Prompt, tokens: int, page: int) -> Job[bool]:
        """Fills the page with the state after the first `tokens` tokens. The result: whether it was found and verified;
        if not, the page holds garbage. ValueError for a page or a number of tokens that does not exist."""
        job = self._transfer.load([self._chunk(prompt, tokens, page)], owner_of(prompt.salt))._then(bool)
        job.when_done(lambda restored: self._count(restored_states=restored))
        return job

    def store(self, prompt: Prompt, tokens: int, page: int) -> Job[bool]:
        """Stores the page as the state after the first `tokens` tokens, if the store has none. `tokens` must be a
        multiple of `every_tokens` or an end of the prompt, its items or turns, else nothing will match it. The result:
        for a store on this host, whether it now holds a state that it did not hold before; for a store elsewhere,
        whether the state was handed to it. ValueError as in `retrieve`."""
        job = self._transfer.store([self._chunk(prompt, tokens, page)], owner_of(prompt.salt))._then(bool)
        job.when_done(lambda stored: self._count(stored_states=stored))
        return job

    def stats(self) -> dict[str, float]:
        """Counts since this cache was made: queried_states (calls of `match`), hit_states (those that found a state),
        hit_rate (their ratio, 0 to 1), restored_states and stored_states (calls of `retrieve` and `store` that returned
        True). The store's own counters are `backend.stats()`."""
        return super().stats()

    def _chunk(self, prompt: Prompt, tokens: int, page: int) -> Chunk:
        checked_prompt(prompt)
        if not 0 < count("tokens", tokens) <= len(prompt):
            raise ValueError(f"tokens: expected 1 to {len(prompt)}, the prompt's length, got {tokens}")
        if count("page", page) >= self.layout.num_pages:
            raise ValueError(f"page: expected less than {self.layout.num_pages}, got {page}")
        (key,) = self._keys(prompt, [tokens])
        return Chunk(key, torch.tensor([page]), self.layout.page_tokens)

    def _keys(self, prompt: Prompt, cuts: Sequence[int]) -> list[bytes]:
        self._check()
        if not cuts:
            return []
        root = self._namespace.root(prompt.salt, prompt.lora, prompt.prompt_embeds)
        keys = ops.prefix_keys(prompt.token_ids, prompt.items, root, cuts).numpy()
        return [record_key(key.tobytes()) for key in keys]
