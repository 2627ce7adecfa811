"""LiveNamespace: the namespace of an engine while it runs, whose weights may change."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Iterable

from blake3 import blake3

from lmcache_mm.prompt import Namespace
from lmcache_mm.vllm import identity
from lmcache_mm.vllm.api import VllmConfig
from lmcache_mm.vllm.kv.messages import Layout
from lmcache_mm.vllm.options import NAME, Group, Options

logger = logging.getLogger("vllm.lmcache_mm")


class LiveNamespace:
    """`now` is None until all ranks have reported their layouts, and from a reset until they have digested the weights.

    weights: the name of the weights since the last reset, None for those of startup, identity.UNKNOWN while it is
    unknown. Other engines know only the weights of startup. resets: how many there were; digests of the weights are
    reported under this number.
    """

    def __init__(self, config: VllmConfig, options: Options, groups: Iterable[Group]) -> None:
        self.now: Namespace | None = None
        self.weights: str | None = None
        self.resets = 0
        parallel = config.parallel_config
        self.ranks: int = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
        self._base = identity.namespace_of(config, [group.kv_dtype for group in groups], options.weights)
        self._layouts: dict[int, Layout] = {}  # by rank
        self._looked: dict[int, bytes] = {}  # by rank: digests of the weights since the last reset
        self._engine = config.instance_id

    @property
    def complete(self) -> bool:
        """Whether all ranks have reported their layouts."""
        return len(self._layouts) == self.ranks

    @property
    def parts(self) -> list[tuple[int, int]]:
        """The group numbers that each rank has reported, and the rank."""
        return [(number, rank) for rank, one in sorted(self._layouts.items()) for number in one.groups]

    def learn_layouts(self, layouts: dict[int, Layout]) -> bool:
        """Takes layouts, by rank. Returns whether they are news."""
        if self._layouts | layouts == self._layouts:
            return False
        self._layouts |= layouts
        self._make()
        return True

    def reset(self) -> None:
        """Handles a reset of the engine's caches, after which its weights may differ."""
        self.resets += 1
        self._looked = {}
        self._call_weights(identity.UNKNOWN)

    def learn_weights(self, told: dict[tuple[int, int], bytes]) -> bool:
        """Takes digests of the weights, by number of resets and rank. Returns whether the weights have a name now. They
        are called as at startup if they are the same, else by their digest, so that engines with the same update share
        records."""
        self._looked |= {rank: digest for (number, rank), digest in told.items() if number == self.resets}
        if self.weights != identity.UNKNOWN or len(self._looked) < self.ranks:
            return False
        digests = [self._looked[rank] for rank in range(self.ranks)]
        if not all(digests):
            self._call_weights(f"not seen after a reset {uuid.uuid4().hex}")
            logger.warning("%s: the model's weights cannot be read: nothing stored before this reset is used", NAME)
        elif digests == [self._layouts[rank].weights for rank in range(self.ranks)]:
            self._call_weights(None)
        else:
            self._call_weights(f"in memory {blake3(b''.join(digests)).hexdigest()}")
            logger.info("%s: the weights have changed: nothing stored for the old ones is used", NAME)
        return True

    def _call_weights(self, name: str | None) -> None:
        self.weights = identity.weights_now[self._engine] = name
        self._make()

    def _make(self) -> None:
        if not self.complete:
            return
        prints = [self._layouts[rank].fingerprint for rank in sorted(self._layouts)]
        layout = prints[0] if len(prints) == 1 else blake3(b"".join(prints)).digest()
        base = self._base if self.weights is None else self._base._with_weights(self.weights)
        self.now = None if self.weights == identity.UNKNOWN else base.with_layout(layout)
