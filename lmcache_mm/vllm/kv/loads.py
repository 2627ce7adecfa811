"""Loads: those that are planned, and those whose end the workers have not reported."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

from lmcache_mm.vllm.api import KVConnectorOutput
from lmcache_mm.vllm.kv.messages import Load, RecordPages, WorkerMetadata


class Loads:
    """See the module. The store holds a load's records until the load has ended."""

    def __init__(self) -> None:
        self._planned: list[Load] = []  # for the next step
        self._under_way: dict[int, tuple[Load, Callable[[], object]]] = {}  # by serial: load and release of its records
        self._serials = count()

    def plan(self, request_id: str, owner: bytes, pages: list[RecordPages], release: Callable[[], object]) -> None:
        load = Load(next(self._serials), request_id, owner, pages)
        self._planned.append(load)
        self._under_way[load.serial] = (load, release)

    def take_planned(self) -> list[Load]:
        planned, self._planned = self._planned, []
        return planned

    def request_ids(self) -> set[str]:
        """The requests of all loads that have not ended."""
        return {load.request_id for load, _ in self._under_way.values()}

    def take_ended(self, output: KVConnectorOutput) -> list[tuple[str, bool]]:
        """The requests whose loads have ended, as the workers report it, and whether they failed. Reports of other
        loads belong to another connector."""
        told = output.kv_connector_worker_meta
        loaded = told.loaded if isinstance(told, WorkerMetadata) else set()
        failed, bad_pages = output.failed_recving or set(), output.invalid_block_ids or set()
        finished = set(output.finished_recving or ()) | set(failed)
        ended = []
        for serial, (load, release) in list(self._under_way.items()):
            if serial not in loaded and load.request_id not in finished:
                continue
            del self._under_way[serial]
            release()
            bad = serial in loaded and any(page in bad_pages for one in load.records for page in one.pages)
            ended.append((load.request_id, bad or load.request_id in failed))
        return ended

    def close(self) -> None:
        for _, release in self._under_way.values():
            release()
