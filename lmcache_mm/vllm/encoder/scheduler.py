"""The encoder connector's side in the scheduler: finds items that need no encoder because their output is available.

vLLM asks by identifier, which a client may have chosen, and its engine dies if an output that was claimed is not in the
step. So an item is claimed only for the request that vLLM is about to schedule, by the digest of that request's own
data, and only once its output is verified and in this process's memory. The step carries the output to the workers.
"""

from __future__ import annotations

import logging
import time
import weakref
from concurrent.futures import wait
from dataclasses import dataclass, field
from typing import Any

from lmcache_mm.encoder_cache import Packed, has_payload, output_key, payload_bytes, read_description, read_payload
from lmcache_mm.lane import Lane, Work
from lmcache_mm.prompt import Namespace, owner_of
from lmcache_mm.stores import kind_of, open_store
from lmcache_mm.stores.store import Store
from lmcache_mm.vllm import identity
from lmcache_mm.vllm.api import ECConnectorOutput, Request, SchedulerOutput, VllmConfig
from lmcache_mm.vllm.encoder.messages import EncoderMetadata, EncoderWorkerMetadata, OutputKey
from lmcache_mm.vllm.metrics import EncoderStats
from lmcache_mm.vllm.options import ASK_AGAIN_S, ENCODER_NAME, EncoderOptions, drop_malformed_params, wishes_of

AT_ONCE_S = 0.001  # how long a step waits for work under way; after that, vLLM asks again in the next step
MOST_HELD_BYTES = 1 << 30  # memory for outputs that waiting requests hold; items beyond it are encoded
PASSED_THROUGH = "prompt_embeds"  # the modality without an encoder

logger = logging.getLogger("vllm.lmcache_mm")


@dataclass
class _Request:
    request: Request
    loads: bool
    saves: bool
    waits: bool  # for outputs that another engine promised
    identifying: Work | None = None  # the work that computes its keys
    keys: list[OutputKey | None] = field(default_factory=list)  # one per item; None: item not identified
    fetching: dict[int, Work] = field(default_factory=dict)  # fetches under way, by item
    outputs: dict[int, Packed | None] = field(default_factory=dict)  # fetched outputs, by item; None: not in the store
    asked_at: float = 0.0  # when it began to wait
    ask_at: dict[int, float] = field(default_factory=dict)  # by item: do not ask the store again before this time
    kept: set[bytes] = field(default_factory=set)  # keys of outputs that the store had or is being given


class EncoderScheduler:
    """See the module."""

    def __init__(self, config: VllmConfig, options: EncoderOptions) -> None:
        self.stats = EncoderStats()
        self._options = options
        self._loads, self._saves = config.ec_transfer_config.is_ec_consumer, config.ec_transfer_config.is_ec_producer
        self._base = self._namespace = identity.encoder_namespace_of(config, options.weights)
        self._engine = config.instance_id
        self._weights_now = identity.weights_now.get(self._engine)
        lora = config.lora_config
        self._lora_changes_encoder = lora is not None and lora.enable_tower_connector_lora
        self._adapters = identity.Adapters()
        self._store: Store = open_store(options.store, self.stats.observe)
        self._kind = kind_of(options.store)
        self._identifying, self._fetches = Lane("lmcache_mm identify items"), Lane("lmcache_mm encoder outputs")
        self._requests: dict[str, _Request] = {}
        self._held: weakref.WeakValueDictionary[bytes, Packed] = weakref.WeakValueDictionary()
        self._in_engine: set[str] = set()  # identifiers whose outputs vLLM has in its own cache
        self._claims: dict[str, Packed] = {}  # by identifier, for the request that is being scheduled
        self._claims_of = ""
        self._planned: dict[str, Packed] = {}  # for the next step
        self._unavailable: set[str] = set()
        self._at_once_left_s = AT_ONCE_S

    def close(self) -> None:
        ended = [lane.close(self._options.timeout_s) for lane in (self._identifying, self._fetches)]
        if all(ended):  # otherwise a lane still uses the store
            self._store.close()

    # --- Before a request is scheduled

    def ensure(self, request: Request, computed_tokens: int) -> bool:
        """Whether it is decided which of the request's items past `computed_tokens` can be claimed."""
        self._claims, self._claims_of = {}, request.request_id
        try:
            return self._ensure(request, computed_tokens)
        except Exception:  # no request may end the engine, whatever its data
            logger.exception("%s: request %s is no longer cached", ENCODER_NAME, request.request_id)
            self._claims = {}
            self.drop(request)
            return True

    def _ensure(self, request: Request, computed_tokens: int) -> bool:
        drop_malformed_params(request)
        self._follow_weights()
        # Check this first. vLLM may have the output now but drop it before it is needed, and then nothing could compute
        # it again. Also, a client that knows an image's identifier has not necessarily had the image.
        if any(identity.lacks_what_is_encoded(feature.data) for feature in request.mm_features):
            self._unavailable.add(request.request_id)
            return False
        needed = [
            i
            for i, feature in enumerate(request.mm_features)
            if feature.mm_position.offset + feature.mm_position.length > computed_tokens
            # An engine that only encodes asks for all items, to know what it can promise.
            and not (self._loads and feature.identifier in self._in_engine)
        ]
        if known := self._requests.get(request.request_id):
            known.outputs = {i: output for i, output in known.outputs.items() if i in needed}
        if not needed or self._weights_now == identity.UNKNOWN:
            return True
        ours = self._requests.get(request.request_id) or self._add(request)
        if len(ours.keys) < len(request.mm_features):  # new, or a session (`resumable`) that continues with more items
            self._begin_identifying(ours)
        ours.asked_at = ours.asked_at or time.monotonic()
        if ours.identifying is not None:
            if not self._is_done(ours.identifying):
                return self._give_up(ours, self._identifying)
            ours.keys, ours.identifying = ours.identifying.future.result(), None
        fetched = not ours.loads or all([self._fetch(request, ours, i) for i in needed])
        if not fetched and not self._give_up(ours, self._fetches):
            return False
        ours.asked_at, ours.waits = 0.0, False
        self._claim(request, ours, needed)
        return True

    def _follow_weights(self) -> None:
        """Picks up new weights after a reset. vLLM tells only the KV connector of resets: see identity.weights_now."""
        weights_now = identity.weights_now.get(self._engine)
        if weights_now == self._weights_now:
            return
        self._weights_now = weights_now
        self._namespace = self._base if self._weights_now is None else self._base._with_weights(self._weights_now)
        for ours in self._requests.values():
            self._abandon(ours)
        self._requests, self._planned = {}, {}
        self._in_engine.clear()

    def _add(self, request: Request) -> _Request:
        wishes = wishes_of(request.ec_transfer_params, request.kv_transfer_params)
        # After a change of weights, another engine's keys may differ from this one's.
        waits = wishes.wait and self._loads and self._weights_now is None
        ours = _Request(request, wishes.load, wishes.store and self._saves, waits)
        self._requests[request.request_id] = ours
        return ours

    def _begin_identifying(self, ours: _Request) -> None:
        request, features, namespace = ours.request, list(ours.request.mm_features), self._namespace
        ours.keys += [None] * (len(features) - len(ours.keys))
        ours.identifying = self._identifying.submit(lambda _: self._identify(request, features, namespace))

    def _identify(self, request: Request, features: list[Any], namespace: Namespace) -> list[OutputKey | None]:
        """The keys of the outputs of a request's items. Runs on a lane, in parallel with the scheduler."""
        keys: list[OutputKey | None] = [None] * len(features)
        try:
            lora = self._adapters.digest(request.lora_request) if self._lora_changes_encoder else None
            salt = request.cache_salt or None
            root, owner = namespace.root(salt, lora), owner_of(salt)
        except Exception as error:  # from anything that the request refers to
            logger.warning("%s: request %s is not cached: %s", ENCODER_NAME, request.request_id, error)
            return keys
        for i, feature in enumerate(features):
            if feature.modality == PASSED_THROUGH:
                continue
            try:
                keys[i] = OutputKey(output_key(root, identity.digest_of_item(feature), feature.modality), owner)
            except Exception as error:  # from the item's data, which can be anything
                logger.warning("%s: an item of request %s is not cached: %s", ENCODER_NAME, request.request_id, error)
        return keys

    def _fetch(self, request: Request, ours: _Request, item: int) -> bool:
        """Whether it is known if the store has an item's output."""
        key = ours.keys[item]
        if key is None or item in ours.outputs:
            return True
        if item not in ours.fetching:
            if time.monotonic() < ours.ask_at.get(item, 0.0):
                return False
            self.stats.add(encoder_queried_items=item not in ours.ask_at)
            ours.ask_at[item] = 0.0
            ours.fetching[item] = self._fetches.submit(lambda _: self._read(ours, key))
        if not self._is_done(ours.fetching[item]):
            return False
        output: Packed | None = ours.fetching.pop(item).future.result()
        if output is None and ours.waits:
            ours.ask_at[item] = time.monotonic() + ASK_AGAIN_S
            if ours.ask_at[item] < ours.asked_at + self._options.timeout_s:
                return False
            ours.waits = False
            self.stats.add(encoder_broken_promises=1)
        self.stats.add(encoder_hit_items=output is not None)
        ours.outputs[item] = output
        return True

    def _read(self, ours: _Request, key: OutputKey) -> Packed | None:
        """A verified output in memory, shared by all requests that wait for it. A request does not wait for an output
        that is in the store but cannot be read."""
        output = self._held.get(key.key)
        if output is not None:
            return output
        try:
            description = read_description(self._store, key.key, key.owner)
            if description is None or not has_payload(self._store, key.key, description, self._options.codec):
                return None
            held_bytes = sum(one.payload.nbytes for one in list(self._held.values()))
            if held_bytes + payload_bytes(description) > MOST_HELD_BYTES:
                ours.waits = False
                return None
            begun = time.perf_counter()
            output = read_payload(self._store, key.key, description, key.owner, codec=self._options.codec)
        except Exception:
            logger.exception("%s: a store could not be read", ENCODER_NAME)
            ours.waits = False
            self.stats.add(encoder_failed_lookups=1)
            return None
        if output is None:
            ours.waits = False
        else:
            self.stats.observe(self._kind, "load", time.perf_counter() - begun, output.payload.nbytes)
            self._held[key.key] = output
        return output

    def _is_done(self, work: Work) -> bool:
        """Whether the work is done. Waits for it; all such waits of one step take at most AT_ONCE_S together."""
        if not work.future.done() and self._at_once_left_s > 0:
            begun = time.monotonic()
            wait([work.future], self._at_once_left_s)
            self._at_once_left_s -= time.monotonic() - begun
        return work.future.done()

    def _give_up(self, ours: _Request, lane: Lane) -> bool:
        """True if the request has waited too long, or its lane makes no progress; False: ask again."""
        timeout_s = self._options.timeout_s
        moves = lane.stalled_s() < timeout_s
        if moves and time.monotonic() - ours.asked_at < timeout_s:
            return False
        if ours.identifying is not None:
            ours.saves = False
        self._abandon(ours)
        ours.loads, ours.identifying = False, None
        # A store that answers, but not with what was promised, is not to blame.
        self.stats.add(**{"encoder_broken_promises" if ours.waits and moves else "encoder_failed_lookups": 1})
        return True

    def _abandon(self, ours: _Request) -> None:
        """Abandons the request's work in progress."""
        for work in [*ours.fetching.values(), *([ours.identifying] if ours.identifying else [])]:
            work.abandon()
        ours.fetching.clear()

    def _claim(self, request: Request, ours: _Request, needed: list[int]) -> None:
        """Sets the claims. An identifier that stands for two contents in one request is not claimed."""
        keys: dict[str, set[bytes]] = {}
        for i in needed:
            output, key = ours.outputs.get(i), ours.keys[i]
            feature = request.mm_features[i]
            keys.setdefault(feature.identifier, set()).add(key.key if key else b"")
            if output is not None and _fits(output, request.get_num_encoder_embeds(i)):
                self._claims[feature.identifier] = output
                if key is not None:
                    ours.kept.add(key.key)
        self._claims = {name: output for name, output in self._claims.items() if len(keys[name]) == 1}

    def claims(self, identifier: str) -> bool:
        """Whether the item is claimed, for the request of the last call of `ensure`."""
        return identifier in self._claims

    # --- When it is scheduled

    def plan(self, request: Request, item: int) -> None:
        """The item's output will be in vLLM's cache after the next step: loaded if it was claimed, else encoded."""
        identifier = request.mm_features[item].identifier
        output = self._claims.pop(identifier, None) if self._claims_of == request.request_id else None
        if output is None:
            return
        if self._loads:
            self._planned[identifier] = output
        self._in_engine.add(identifier)
        self.stats.add(encoder_loaded_items=1)
        ours = self._requests[request.request_id]
        ours.outputs = {i: one for i, one in ours.outputs.items() if one is not output}

    def plan_step(self, step: SchedulerOutput) -> EncoderMetadata:
        self._at_once_left_s = AT_ONCE_S
        self._claims = {}
        for identifier in step.free_encoder_mm_hashes:
            self._in_engine.discard(identifier)
            self._planned.pop(identifier, None)
        metadata = EncoderMetadata()
        for request_id, items in step.scheduled_encoder_inputs.items():
            ours = self._requests.get(request_id)
            if ours is None:
                continue
            for item in items:
                identifier = ours.request.mm_features[item].identifier
                self._in_engine.add(identifier)
                # vLLM may encode an item whose output it still had when `ensure` was called.
                key = ours.keys[item] if ours.saves and item < len(ours.keys) else None
                if key is not None:
                    metadata.saves[identifier] = key
                    ours.kept.add(key.key)
        if step.total_num_scheduled_tokens:  # in an empty step, workers ignore the metadata
            metadata.loads, self._planned = self._planned, {}
        return metadata

    # --- Afterwards

    def take_output(self, output: ECConnectorOutput) -> None:
        told = output.ec_connector_worker_meta
        if isinstance(told, EncoderWorkerMetadata):
            self.stats.add(**told.counts)

    def take_unavailable(self) -> set[str]:
        """Requests with an item that cannot be encoded: see `Missing`."""
        unavailable, self._unavailable = self._unavailable, set()
        return unavailable

    def promise(self, request: Request) -> dict[str, Any] | None:
        """The answer of an engine that only encodes: the next engine may wait for all of the request's items. It names
        no data, because an engine that loads computes the keys from its own request. `item_indices` is for vLLM's
        proxy, which expects every item to be listed."""
        ours = self._requests.get(request.request_id)
        if ours is None or self._loads or self._weights_now is not None:
            return None
        if not all(key is not None and key.key in ours.kept for key in ours.keys):
            return None
        return {"lmcache_mm": {"wait": True, "item_indices": list(range(len(ours.keys)))}}

    def drop(self, request: Request) -> None:
        ours = self._requests.pop(request.request_id, None)
        if ours is not None:
            self._abandon(ours)


def _fits(output: Packed, embeds: int) -> bool:
    """Whether the output has the shape that vLLM keeps for an item: one row per embedding."""
    tensors = output.views()
    return len(tensors) == 1 and tensors[0].ndim == 2 and len(tensors[0]) == embeds
