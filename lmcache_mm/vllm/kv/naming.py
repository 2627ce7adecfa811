"""Naming: the record keys of requests, from what determines their KV."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from lmcache_mm.lane import Work
from lmcache_mm.prompt import Item, Namespace, owner_of
from lmcache_mm.vllm import identity
from lmcache_mm.vllm.api import Request
from lmcache_mm.vllm.kv.request_tracker import RequestTracker
from lmcache_mm.vllm.options import NAME, Options

logger = logging.getLogger("vllm.lmcache_mm")


class Naming:
    """Makes the trackers of an engine's requests, in parallel with its scheduler. unit, states: see RequestTracker."""

    def __init__(self, options: Options, chunk_tokens: int, unit: int, states: bool) -> None:
        self._trusts = options.identifiers == "trust"
        self._chunk_tokens, self._states = chunk_tokens, states
        self._whole = 1 if options.opaque_tails else unit
        self._identifiers, self._adapters = identity.Identifiers(), identity.Adapters()

    def tracker_of(self, request: Request, namespace: Namespace | None) -> RequestTracker | None:
        """The tracker of a request, with the keys of its prompt; None if it is unknown what determines the request's
        KV. Items are digested even without a namespace, when the request is not cached, because vLLM caches what it
        computes from them under their identifiers."""
        try:
            items = self._items(request.mm_features)
            if namespace is None:
                return None
            lora = self._adapters.digest(request.lora_request)
            embeds = identity.digest_of_embeds(request.prompt_embeds, getattr(request, "prompt_is_token_ids", None))
            salt = request.cache_salt or None
            prompt_tokens = request.num_prompt_tokens
            root = namespace.root(salt, lora, embeds)
            tracker = RequestTracker(
                items, root, owner_of(salt), prompt_tokens, self._chunk_tokens, self._whole, self._states
            )
            tracker.records(request.all_token_ids, prompt_tokens)
        except Exception as error:  # from anything in the request
            logger.warning("%s: request %s is not cached: %s", NAME, request.request_id, error)
            return None
        return tracker

    def tracker_with_part(
        self,
        request_id: str,
        features: Sequence[Any],
        token_ids: list[int],
        tracker: RequestTracker | None,
        before: Work | None,
    ) -> RequestTracker | None:
        """Like `tracker_of`, for the next part of a session. tracker: of the earlier parts; the result of `before`
        replaces it."""
        try:
            items = self._items(features)
            tracker = before.future.result() if before else tracker
            return tracker.grown(items, token_ids) if tracker else None
        except Exception as error:  # from the part's data, which can be anything
            logger.warning("%s: request %s is no longer cached: %s", NAME, request_id, error)
            return None

    def agreed(self, features: Sequence[Any]) -> bool:
        """Whether each item's identifier still stands for one content."""
        return self._trusts or not any(self._identifiers.distrusted(feature.identifier) for feature in features)

    def adapter_agreed(self, lora_request: Any) -> bool:
        """Whether the adapter is still the one that the request's keys name."""
        return self._adapters.still_agreed(lora_request)

    def distrust(self, features: Sequence[Any]) -> None:
        """Takes items that vLLM's caches will have before they are named."""
        self._identifiers.distrust(feature.identifier for feature in features)

    def _items(self, features: Sequence[Any]) -> list[Item]:
        return [
            Item(name, feature.mm_position.offset, feature.mm_position.length, feature.modality)
            for name, feature in zip(self._names_of_items(features), features, strict=True)
        ]

    def _names_of_items(self, features: Sequence[Any]) -> list[str]:
        """The items' names. Raises Unknown if an item has no digest, or its identifier has stood for other data."""
        if self._trusts:
            return [feature.identifier for feature in features]
        names = []
        for feature in features:
            try:
                names.append(identity.digest_of_item(feature))
            except Exception:  # the data can be anything
                names.append("")
        agreed = [
            bool(name) and self._identifiers.agree(feature.identifier, name)
            for feature, name in zip(features, names, strict=True)
        ]
        self.distrust([feature for feature, name in zip(features, names, strict=True) if not name])
        for feature, name, good in zip(features, names, agreed, strict=True):
            if not name:
                raise identity.Unknown(f"the data of the item {feature.identifier!r} cannot be digested")
            if not good:
                raise identity.Unknown(f"the identifier {feature.identifier!r} was used for other data before")
        return names
