"""What `serve --metrics` answers: /metrics for Prometheus, and /healthz."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from lmcache_mm.stores.local.shm import ShmStore
from lmcache_mm.stores.metered import BYTES, SECONDS
from lmcache_mm.stores.peers.server import Server

SILENT_S = 5.0  # then the connection of a client that sends nothing is closed
GAUGES = {
    "capacity_bytes": "Room of the store.",
    "used_bytes": "Bytes of all payloads in the store.",
    "records": "Records in the store.",
    "processes": "Processes that have the store open, this one included.",
}
COUNTERS = {
    "hits": "Records that other hosts requested and got.",
    "misses": "Records that other hosts requested and that the store did not have.",
    "corrupt": "Records that were found damaged and removed.",
}


class Metrics:
    """Answers at an address until `close`, to everybody who reaches it: metrics, no keys and no payloads.

    Register a server by `watch`, and give its constructor `answered`. OSError where the address cannot be bound."""

    def __init__(self, address: tuple[str, int]) -> None:
        self._registry = CollectorRegistry()
        self.seconds = Histogram(
            "lmcache_mm_serve_seconds", "Seconds to answer a request.", buckets=SECONDS, registry=self._registry
        )
        self.bytes = Histogram(
            "lmcache_mm_serve_bytes", "Bytes sent to answer a request.", buckets=BYTES, registry=self._registry
        )
        self._figures: _Figures | None = None
        metrics = self

        class Handler(BaseHTTPRequestHandler):
            timeout = SILENT_S

            def do_GET(self) -> None:
                status, kind, body = metrics._answer(self.path.split("?")[0], self.headers.get("Accept", ""))
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Scrapes are no news."""

        family, _, _, _, where = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]

        class Http(ThreadingHTTPServer):
            address_family = family

        self._http = Http(where[:2], Handler)  # type: ignore[arg-type]
        self.address: tuple[str, int] = self._http.server_address[:2]  # type: ignore[assignment]
        self._thread = threading.Thread(target=self._http.serve_forever, name="lmcache_mm metrics", daemon=True)
        self._thread.start()

    def answered(self, seconds: float, size: int) -> None:
        self.seconds.observe(seconds)
        self.bytes.observe(size)

    def watch(self, store: ShmStore, server: Server) -> None:
        self._figures = _Figures(store, server)
        self._registry.register(self._figures)

    def close(self) -> None:
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def _answer(self, path: str, accept: str) -> tuple[int, str, bytes]:
        """Status, content type and body."""
        if path == "/metrics":
            encode, kind = choose_encoder(accept)
            return 200, kind, encode(self._registry)
        if path == "/healthz":
            wrong = self._figures.wrong() if self._figures else "the store is not lent yet"
            return 503 if wrong else 200, "text/plain; charset=utf-8", f"{wrong or 'ok'}\n".encode()
        return 404, "text/plain; charset=utf-8", b"expected /metrics or /healthz\n"


class _Figures(Collector):
    """Metrics of a store and its server, read at each scrape."""

    def __init__(self, store: ShmStore, server: Server) -> None:
        self._store, self._server = store, server

    def wrong(self) -> str:
        """Nothing if the store can be lent."""
        try:
            self._store.stats()
        except Exception as error:
            return f"the store cannot be used: {error}"
        return "" if self._server.accepts() else "no connections are accepted"

    def collect(self) -> Iterator[Metric]:
        stats = self._store.stats()
        for name, text in GAUGES.items():
            yield GaugeMetricFamily(f"lmcache_mm_store_{name}", text, value=stats[name])
        for name, text in COUNTERS.items():
            yield CounterMetricFamily(f"lmcache_mm_serve_{name}", text, value=stats[name])
        text = "Connections from other hosts."
        yield GaugeMetricFamily("lmcache_mm_serve_connections", text, value=self._server.connections())
