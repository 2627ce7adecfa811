"""Stores: content-addressed maps from record keys to payloads, opened by URL."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from lmcache_mm.extras import how_to_install
from lmcache_mm.secret import Seal
from lmcache_mm.stores.local.file import FileStore
from lmcache_mm.stores.local.mem import MemStore
from lmcache_mm.stores.local.shm import ShmStore
from lmcache_mm.stores.local.slab import SlabStore
from lmcache_mm.stores.local.slab_files import shm_directory
from lmcache_mm.stores.metered import Observe
from lmcache_mm.stores.peers.channel import Tls, host_and_port
from lmcache_mm.stores.peers.nixl import NixlStore
from lmcache_mm.stores.peers.peer import PeerStore
from lmcache_mm.stores.remote.remote import RemoteStore
from lmcache_mm.stores.store import SlotStore, Store
from lmcache_mm.stores.tiered import TieredStore
from lmcache_mm.stores.tiered_slots import TieredSlotStore

__all__ = ["SlotStore", "Store", "open_store"]

UNITS: dict[str, int] = {"": 1, "B": 1} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("iB", 1024), ("B", 1000))
}


def open_store(url: str | Sequence[str], observe: Observe | None = None) -> Store:
    """Opens the store that `url` names, or a list of URLs as tiers, the fastest first. observe: called as
    observe(kind, "load" or "store", seconds, bytes) for each read of and put into the tiers after the first.

    mem://?capacity=1GiB             one buffer in this process
    shm:///NAME?capacity=8GiB        shared memory of all processes of the user on this host; outlives them
    file:///DIR?capacity=200GiB      a directory on a disk, shared in the same way; outlives a restart of the machine
                                     (DIR is created, its parent is not)
    valkey://HOST:PORT               a Valkey or Redis server; cluster=1 for a cluster; tls=1, ca=FILE for TLS
    s3://BUCKET/PREFIX               objects in S3, or at endpoint=URL in a server with S3's API; region=NAME
    mooncake://MASTER:PORT           the pooled memory of a Mooncake Store, to which this process lends capacity=SIZE;
                                     hostname=THIS_HOST, protocol=tcp, device=NAME, metadata=URL, admin=HOST:PORT
    peer://HOST:PORT?tls=/DIR        another host's shm: store, read only; that host runs `lmcache-mm serve`
    nixl://HOST:PORT?trusted_network=1   the same, read through NIXL, for networks that can be trusted
    tiered:URL,URL,...               several as one, the fastest first; see `TieredStore`

    shm: and file: also take quota=SIZE, the most bytes per owner, and ttl=SECONDS, after which a record counts as
    gone. If the store exists, capacity may be left out. peer: takes connections=4, the number that one call uses at
    once, and timeout=2, the most seconds per call; tls may be left out on loopback addresses only. nixl: takes timeout
    and tls too.

    valkey:, s3: and mooncake: need the deployment's secret (see `lmcache_mm.secret`). They take timeout=SECONDS, the
    most that a call waits, and connections=NUMBER, the requests at a time; valkey: and s3: also take ttl=SECONDS.
    Credentials come from the environment, see docs/stores.md. An unreachable server is not an error: the store has no
    hits. It is an error if only one of a valkey: URL and its server uses TLS.

    Raises TypeError or ValueError if `url` is not a store's URL, PermissionError, OSError or RuntimeError if the store
    cannot be opened (see `SlabStore.open`), RuntimeError if its client is not installed.
    """
    urls = [url] if isinstance(url, (str, bytes)) or not isinstance(url, Sequence) else url
    for one in urls:
        if not isinstance(one, str):
            raise TypeError(f"store: expected a URL or a list of URLs, got {type(one).__name__}")
    if any(_CREDENTIALS.search(one) for one in urls):
        raise ValueError("store: expected a URL without user and password: credentials come from the environment")
    if not isinstance(url, str):
        return _open_tiers(list(url), observe)
    if url.startswith("tiered:"):
        return _open_tiers(tiers_of(url), observe)
    scheme, _, _ = url.partition(":")
    if scheme not in _OPENERS or not url.startswith(f"{scheme}://"):
        hint = ": a Redis server is valkey://HOST:PORT" if scheme in ("redis", "rediss") else ""
        schemes = ", ".join(f"{scheme}://" for scheme in _OPENERS)
        raise ValueError(f"store: expected a URL that begins with {schemes} or tiered:, got {url!r}{hint}")
    return _OPENERS[scheme](url)


def tiers_of(url: str) -> list[str]:
    """The URLs that a tiered: URL consists of; another URL alone. ValueError for tiered://."""
    if url.startswith("tiered://"):
        raise ValueError(f"store: expected tiered:URL,URL,..., without slashes before the first URL, got {url!r}")
    return url.removeprefix("tiered:").split(",") if url.startswith("tiered:") else [url]


def opened(store: str | Sequence[str] | Store) -> Store:
    """The store that a URL or a list of them names, opened; or an open store, as it is. Raises what `open_store`
    raises, and TypeError for anything else."""
    if isinstance(store, Sequence):
        return open_store(store)
    if not hasattr(store, "get_into"):
        raise TypeError(f"store: expected a URL, a list of URLs or an open store, got {type(store).__name__}")
    return store


def kind_of(url: str | Sequence[str]) -> str:
    """The kind of a store, such as "shm"; for tiers, the first one's."""
    first = url if isinstance(url, str) else url[0]
    return first.removeprefix("tiered:").partition(":")[0]


def _open_tiers(urls: Sequence[str], observe: Observe | None) -> Store:
    stores: list[Store] = []
    try:
        for url in urls:
            stores.append(open_store(url))
        kinds = [kind_of(url) for url in urls]
        of_tier = None if observe is None else lambda tier, *moved: observe(kinds[tier], *moved)
        kind = TieredSlotStore if stores and isinstance(stores[0], SlotStore) else TieredStore
        return kind(stores, of_tier)
    except BaseException:
        for store in stores:
            store.close()
        raise


def _open_mem(url: str) -> Store:
    path, options = _split(url, ("capacity",))
    if path:
        raise ValueError(f"store: mem:// takes no host and no path, got {url!r}")
    return MemStore(parse_bytes("capacity", options.get("capacity"), url))


def _open_slab(url: str) -> Store:
    kind, directory = slab_directory(url)
    _, options = _split(url, SLAB_OPTIONS)
    sizes = {name: parse_bytes(name, options[name], url) for name in ("capacity", "quota") if name in options}
    ttl_s = _seconds("ttl", options.get("ttl", "0"))
    return kind.open(directory, sizes.get("capacity"), sizes.get("quota", 0), ttl_s)


def slab_directory(url: str) -> tuple[type[SlabStore], Path]:
    """The kind of slab that a shm: or file: URL names, and the slab's directory."""
    if not url.startswith(("shm://", "file://")):
        raise ValueError(f"store: expected shm:///NAME or file:///DIR, got {url!r}")
    path, _ = _split(url, SLAB_OPTIONS)
    if url.startswith("shm:"):
        if not path.startswith("/"):
            raise ValueError(f"store: expected shm:///NAME, got {url!r}")
        return ShmStore, shm_directory(path[1:])
    if not path.startswith("/") or path == "/":
        raise ValueError(f"store: expected file:///DIR, a directory of its own, got {url!r}")
    return FileStore, Path(path)


def _open_peer(url: str) -> Store:
    place, options = _split(url, PEER_OPTIONS)
    address, tls, timeout_s = _peer(url, place, options)
    return PeerStore(*address, Seal.of_deployment(f"peer://{place}"), tls, _connections(options, 4), timeout_s)


def _open_nixl(url: str) -> Store:
    place, options = _split(url, NIXL_OPTIONS)
    if options.get("trusted_network") != "1":
        raise ValueError(
            f"store: {url!r} reads payloads unencrypted, from a process that trusts every host that can reach its "
            "port: add trusted_network=1 if you trust all those hosts, or use peer:"
        )
    address, tls, timeout_s = _peer(url, place, options)
    return NixlStore(*address, Seal.of_deployment(f"nixl://{place}", "nixl"), tls, timeout_s)


def _peer(url: str, place: str, options: Mapping[str, str]) -> tuple[tuple[str, int], Tls | None, float]:
    """Host and port, certificates, and the most seconds per call."""
    try:
        address = host_and_port(place)
    except ValueError as error:
        raise ValueError(f"store: {error} in {url!r}: the address that `lmcache-mm serve` listens on") from None
    return address, Tls(Path(options["tls"])) if "tls" in options else None, _timeout(options)


SLAB_OPTIONS = ("capacity", "quota", "ttl")
PEER_OPTIONS = ("tls", "connections", "timeout")
NIXL_OPTIONS = ("trusted_network", "tls", "timeout")
_CREDENTIALS = re.compile(r"^[a-z0-9+]+:[^/?#]*@|://[^/?#]*@|\b(?:valkey|s3|mooncake|peer|nixl):[^?]*@")


def _client(extra: str) -> Any:
    """Imports the module of a store whose client is an extra."""
    try:
        return import_module(f"lmcache_mm.stores.remote.{extra}")
    except ImportError as error:
        raise RuntimeError(f"store: {extra}: {error}: {how_to_install(extra)}") from error


def _open_valkey(url: str) -> Store:
    path, options = _split(url, (*_REMOTE_OPTIONS, "ttl", "tls", "ca", "cluster"))
    host, port = _address("valkey", path)
    tls, cluster = _flag("tls", options), _flag("cluster", options)
    if "ca" in options and not tls:
        raise ValueError("store: ca: expected with tls=1 only")

    def connecting(timeout_s: float) -> Any:
        return _client("valkey").connecting(host, port, timeout_s, tls, options.get("ca"), cluster)

    return _open_remote(f"valkey://{path}", options, connecting, connections=4, names_at_once=1000)


def _open_s3(url: str) -> Store:
    path, options = _split(url, (*_REMOTE_OPTIONS, "ttl", "endpoint", "region"))
    bucket, _, prefix = path.partition("/")
    if not bucket or ":" in bucket:
        raise ValueError(f"store: expected s3://BUCKET/PREFIX, got {'another bucket' if bucket else 'no bucket'}")

    def connecting(timeout_s: float) -> Any:
        endpoint, region = options.get("endpoint"), options.get("region")
        return _client("s3").connecting(bucket, prefix, endpoint, region, timeout_s)

    return _open_remote(f"s3://{path}", options, connecting, connections=16, names_at_once=64)


def _open_mooncake(url: str) -> Store:
    names = ("capacity", "admin", "hostname", "protocol", "device", "metadata")
    path, options = _split(url, (*_REMOTE_OPTIONS, *names))
    master = _address("mooncake", path)
    admin = _address("mooncake", options.get("admin", f"{path.rpartition(':')[0]}:9003"))
    capacity = parse_bytes("capacity", options["capacity"], url) if "capacity" in options else 0
    others = {name: options[name] for name in names[2:] if name in options}

    def connecting(timeout_s: float) -> Any:
        return _client("mooncake").connecting(master, admin, capacity, timeout_s, **others)

    return _open_remote(f"mooncake://{path}", options, connecting, connections=4, names_at_once=1000)


_REMOTE_OPTIONS = ("timeout", "connections")


def _open_remote(
    name: str, options: dict[str, str], connecting: Callable[[float], Any], connections: int, names_at_once: int
) -> Store:
    """connecting(timeout_s): returns the `connect` of `RemoteStore`; connections: the default."""
    scheme = name.partition(":")[0]
    seal = Seal.of_deployment(f"store: {scheme}", scheme)
    timeout_s, ttl_s = _timeout(options), _seconds("ttl", options.get("ttl", "0"))
    wanted = _connections(options, connections)
    return RemoteStore(name, connecting(timeout_s), seal, timeout_s, wanted, names_at_once, ttl_s)


def _connections(options: Mapping[str, str], default: int) -> int:
    wanted = options.get("connections", str(default))
    if not re.fullmatch(r"[1-9]\d{0,2}", wanted, re.ASCII):
        raise ValueError(f"store: connections: expected 1 to 999, got {wanted!r}")
    return int(wanted)


def _timeout(options: Mapping[str, str]) -> float:
    timeout_s = _seconds("timeout", options.get("timeout", "2"))
    if not timeout_s:
        raise ValueError("store: timeout: expected more than 0 seconds")
    return timeout_s


def _seconds(name: str, text: str) -> float:
    if not re.fullmatch(r"\d{1,9}(\.\d+)?", text, re.ASCII):
        raise ValueError(f"store: {name}: expected seconds, got {text!r}")
    return float(text)


def _address(scheme: str, text: str) -> tuple[str, int]:
    """(host, port) of HOST:PORT, where HOST may be an IPv6 address in brackets."""
    found = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[\w.-]+):(\d{1,5})/?", text, re.ASCII)
    if not found or not 0 < int(found[2]) < 65536:
        raise ValueError(f"store: expected {scheme}://HOST:PORT, got {scheme}://{text}")
    return found[1].strip("[]"), int(found[2])


def _flag(name: str, options: dict[str, str]) -> bool:
    if options.get(name, "0") not in ("0", "1"):
        raise ValueError(f"store: {name}: expected 0 or 1, got {options[name]!r}")
    return options.get(name) == "1"


_OPENERS: dict[str, Callable[[str], Store]] = {
    **{"mem": _open_mem, "shm": _open_slab, "file": _open_slab},
    **{"valkey": _open_valkey, "s3": _open_s3, "mooncake": _open_mooncake},
    **{"peer": _open_peer, "nixl": _open_nixl},
}
REMOTE = ("valkey://", "s3://", "mooncake://")


def _split(url: str, known: Sequence[str]) -> tuple[str, dict[str, str]]:
    """(host and path, options); ValueError for unknown options."""
    if "#" in url:
        raise ValueError(f"store: expected a URL without a fragment, got {url!r}")
    parts = urlsplit(url)
    try:
        options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
    except ValueError:
        raise ValueError(f"store: expected NAME=VALUE after the question mark, got {parts.query!r}") from None
    for name in options:
        if name not in known:
            raise ValueError(f"store: unknown option {name!r}; {parts.scheme}: takes {', '.join(known)}")
    return parts.netloc + parts.path, options


def parse_bytes(name: str, text: str | None, url: str) -> int:
    """A positive size such as 512MiB, 8GiB, 2GB or 4096."""
    if text is None:
        raise ValueError(f"store: {name} is missing in {url!r}, such as {name}=8GiB")
    digits = text.rstrip("iBKMGT")
    unit = text[len(digits) :]
    if unit not in UNITS or not digits.isascii() or not digits.isdigit() or not int(digits):
        raise ValueError(f"store: {name}: expected a size such as 512MiB or 8GiB, got {text!r}")
    return int(digits) * UNITS[unit]
