"""The command line: lmcache-mm COMMAND, or python -m lmcache_mm COMMAND."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from lmcache_mm import __version__
from lmcache_mm.commands import calibrate, doctor
from lmcache_mm.extras import how_to_install
from lmcache_mm.secret import Seal
from lmcache_mm.stores import REMOTE, open_store, slab_directory, tiers_of
from lmcache_mm.stores.local import slab
from lmcache_mm.stores.local.shm import ShmStore
from lmcache_mm.stores.local.slab_files import own_directory
from lmcache_mm.stores.peers.channel import Tls, host_and_port
from lmcache_mm.stores.peers.nixl_agent import SlabAgent, interface_of
from lmcache_mm.stores.peers.peer import PeerStore
from lmcache_mm.stores.peers.server import Server
from lmcache_mm.stores.remote.remote import RemoteStore

if TYPE_CHECKING:
    from lmcache_mm.commands.metrics import Metrics

# The counters in stats() are per process, so useless for a process that has just opened the store.
COUNTERS = ("hits", "misses", "corrupt", "puts", "dropped_puts", "evictions", "errors", "promoted", "waiting")


def stat(args: argparse.Namespace) -> int:
    """Prints a store's numbers, one per line. Creates no store."""
    for url in tiers_of(args.url):
        if url.startswith("mem:"):
            raise ValueError("store: each process has its own mem:, so there is nothing to see from here")
        if url.startswith(("shm:", "file:")):
            _check_exists(slab_directory(url)[1])
    with closing(open_store(args.url)) as store:
        if isinstance(store, PeerStore):
            raise ValueError(f"store: {args.url!r} is another host's: run `stat` on that host")
        for name, value in (store.sizes() if isinstance(store, RemoteStore) else store.stats()).items():
            if name.rpartition(".")[2] not in COUNTERS:
                print(f"{name:16} {value}" + (f"  ({doctor.readable(value)})" if name.endswith("_bytes") else ""))
    return 0


def _check_exists(directory: Path) -> None:
    if os.path.lexists(directory):
        own_directory(directory)  # an error that says more
    if not (directory / "slab").exists():  # a failed opening may leave an empty directory
        raise ValueError(f"store: there is no store in {directory}")


def clear(args: argparse.Namespace) -> int:
    """Empties a store, and removes it if it is a slab that nobody has open."""
    if args.url.startswith(REMOTE):
        with closing(open_store(args.url)) as store:
            assert isinstance(store, RemoteStore)
            print(f"{store.clear()} records removed from {store.name}")
        return 0
    if args.url.startswith("tiered:"):
        raise ValueError("store: a tiered: URL names several stores: clear them one by one, each by its own URL")
    if not args.url.startswith(("shm:", "file:")):
        raise ValueError(
            f"store: expected shm:///NAME, file:///DIR or a URL that begins with {', '.join(REMOTE)}, got {args.url!r}"
        )
    kind, directory = slab_directory(args.url)
    if not os.path.lexists(directory):
        raise ValueError(f"store: there is no store in {directory}")
    if slab.remove(directory):
        print(f"removed {directory}")
        return 0
    with closing(kind.open(directory, None)) as store:
        print(f"{store.clear()} records removed; {directory} stays, since processes have it open")
    return 0


def serve(args: argparse.Namespace) -> int:
    """Lends a store to other hosts until SIGINT or SIGTERM."""
    if args.verbose:
        logging.basicConfig(format="%(asctime)s %(message)s")
        logging.getLogger("lmcache_mm").setLevel(logging.INFO)
    stopped = threading.Event()
    before = {number: signal.signal(number, lambda *_: stopped.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if args.nixl and not args.trusted_network:
            raise ValueError(
                "serve: --nixl lends to every host that reaches its port: add --trusted-network if all are trusted"
            )
        address = _address_of("--listen", args.listen)
        tls = Tls(args.tls) if args.tls else None
        seal = Seal.of_deployment("serve")
        with closing(open_store(args.store)) as store:
            if not isinstance(store, ShmStore):
                raise ValueError(f"store: expected shm:///NAME, got {args.store!r}")
            agent = metrics = None
            with ExitStack() as opened:
                if args.metrics:
                    metrics = opened.enter_context(closing(_metrics_at(args.metrics)))
                if args.nixl:
                    interface = interface_of(address[0])
                    agent = opened.enter_context(closing(SlabAgent(store.directory / "slab", interface)))
                answered = metrics.answered if metrics else None
                with _binding("--listen", args.listen):
                    server = Server(store, address, seal, tls, args.connections, agent, answered)
                opened.enter_context(closing(server))
                how = ("with TLS" if tls else "without TLS") + ", and through NIXL" * args.nixl
                print(f"{args.store} is lent at {_place(server.address)}, {how}", flush=True)
                if metrics:
                    metrics.watch(store, server)
                    print(f"metrics at http://{_place(metrics.address)}/metrics and /healthz", flush=True)
                while not stopped.wait(1):  # a signal may come to another thread
                    pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def _metrics_at(address: str) -> Metrics:
    try:
        from lmcache_mm.commands.metrics import Metrics  # noqa: PLC0415
    except ImportError as error:
        raise ValueError(f"serve: --metrics needs the extra: {how_to_install('metrics')} ({error})") from None
    with _binding("--metrics", address):
        return Metrics(_address_of("--metrics", address))


def _address_of(option: str, text: str) -> tuple[str, int]:
    try:
        return host_and_port(text)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None


@contextmanager
def _binding(option: str, address: str) -> Iterator[None]:
    """Errors of the system say which option's address they are about."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{option}: {address}: {error.strerror or error}") from None


def _place(address: tuple[str, int]) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def make_certificates(args: argparse.Namespace) -> int:
    """Makes certificates for hosts, and a CA if there is none; prints their paths."""
    try:
        from lmcache_mm.commands import certificates  # noqa: PLC0415
    except ImportError as error:
        raise ValueError(f"certificates: needs the extra: {how_to_install('peer')} ({error})") from None
    for place in certificates.make(args.directory, args.hosts, args.days):
        print(f"{place}: copy it to that host, and name it in --tls and ?tls=")
    return 0


def _on_store(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """The command; if the store is invalid or cannot be opened, prints one sentence and returns 2."""

    def checked(args: argparse.Namespace) -> int:
        try:
            return run(args)
        except BrokenPipeError:
            raise
        except (ValueError, OSError, RuntimeError) as error:
            print(f"{_name()}: {_sentence(error)}", file=sys.stderr)
            return 2

    return checked


def _sentence(error: Exception) -> str:
    """What an error says, without the number that Python puts before an error of the system."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename is not None else error.strerror
    return str(error)


def _name() -> str:
    """The name under which the program was called."""
    return "lmcache-mm" if Path(sys.argv[0]).name == "lmcache-mm" else "python -m lmcache_mm"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=_name(), description="KV-cache reuse for multimodal models.")
    parser.add_argument("--version", action="version", version=f"lmcache-mm {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, run, text in (
        ("stat", stat, "show what a store holds"),
        ("clear", clear, "remove everything from a store, and a shm: or file: store itself if no process has it open"),
    ):
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        example = "such as shm:///NAME, file:///DIR or valkey://HOST:PORT; you can leave out capacity"
        command.add_argument("url", metavar="URL", help=f"the store's URL, {example}")
        command.set_defaults(run=_on_store(run))
    _add_serve(commands)
    _add_certificates(commands)
    text = "show what this machine offers, what is wrong with it, and how to fix it"
    commands.add_parser("doctor", help=text, description=text[0].upper() + text[1:] + ".").set_defaults(
        run=lambda _: doctor.run()
    )
    calibrate_parser = commands.add_parser("calibrate", help="find the fastest way to copy between a GPU and the host")
    calibrate.add_arguments(calibrate_parser)
    calibrate_parser.set_defaults(run=calibrate.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    parser = make_parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what may come next
        with suppress(ImportError):
            importlib.import_module("argcomplete").autocomplete(parser)
    args = parser.parse_args(arguments)
    try:
        status = int(args.run(args))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader stopped reading, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _add_serve(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    serve_parser = commands.add_parser(
        "serve",
        help="lend a shm: store to other hosts, which open it as peer://HOST:PORT",
        description="Lend a shm: store to other hosts, which open it as peer://HOST:PORT. They can read it but not "
        "change it. Both sides need the deployment's secret, in LMCACHE_MM_SECRET_FILE or LMCACHE_MM_SECRET. Unless "
        "the address is on this host's loopback, both also need certificates (lmcache-mm certificates). The command "
        "stops on SIGINT or SIGTERM.",
    )
    serve_parser.add_argument(
        "--store",
        metavar="URL",
        required=True,
        help="the store to lend, shm:///NAME; if the engines' URLs have a ttl, add the same one "
        "(shm:///NAME?ttl=3600), because records of any age are lent otherwise",
    )
    serve_parser.add_argument(
        "--listen", metavar="HOST:PORT", required=True, help="the address to listen on; port 0 picks a free port"
    )
    serve_parser.add_argument(
        "--tls", metavar="DIR", type=Path, help="the folder with this host's ca.pem, cert.pem and key.pem"
    )
    serve_parser.add_argument(
        "--connections",
        metavar="N",
        type=int,
        default=64,
        help="the most connections at once (default: %(default)s). Each process of a reading engine keeps up to 4 "
        "open. When the limit is reached, idle connections are closed to make room.",
    )
    serve_parser.add_argument(
        "--nixl",
        action="store_true",
        help="also lend to nixl://HOST:PORT, through the network interface that has the address of --listen",
    )
    serve_parser.add_argument(
        "--trusted-network",
        action="store_true",
        help="required by --nixl: says that every host that can reach the port may read the store",
    )
    serve_parser.add_argument(
        "--metrics",
        metavar="HOST:PORT",
        help="serve /metrics and /healthz at this address by HTTP. Everybody who can reach it can read the metrics, "
        "which contain no keys or payloads.",
    )
    serve_parser.add_argument("--verbose", action="store_true", help="log connections to standard error")
    serve_parser.set_defaults(run=_on_store(serve))


def _add_certificates(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    certificates_parser = commands.add_parser(
        "certificates",
        help="make the certificates that hosts need to lend stores to each other",
        description="Make a folder DIR/HOST for each host, with ca.pem, cert.pem and key.pem, for `serve --tls` and "
        "for ?tls= in peer: URLs. The first run also makes the deployment's CA. Keep DIR/ca.key on this machine: later "
        "runs sign certificates with it.",
    )
    certificates_parser.add_argument("directory", metavar="DIR", type=Path, help="created if missing")
    certificates_parser.add_argument(
        "hosts", metavar="HOST", nargs="+", help="a name or address, as in peer://HOST:PORT"
    )
    certificates_parser.add_argument(
        "--days", metavar="N", type=int, default=365, help="for how many days they are valid (default: %(default)s)"
    )
    certificates_parser.set_defaults(run=_on_store(make_certificates))
