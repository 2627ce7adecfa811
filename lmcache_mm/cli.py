"""The command line: python -m lmcache_mm COMMAND."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import closing

from lmcache_mm import calibrate, demo, doctor
from lmcache_mm.stores import REMOTE, open_store, slab, slab_directory
from lmcache_mm.stores.remote import RemoteStore

# Of stats(): what a process counts, which is nothing yet for one that has just opened a store.
COUNTERS = ("hits", "misses", "corrupt", "puts", "dropped_puts", "evictions", "errors", "promoted", "waiting")


def stat(args: argparse.Namespace) -> int:
    """Prints a store's own figures, a line each."""
    with closing(open_store(args.url)) as store:
        for name, value in (store.sizes() if isinstance(store, RemoteStore) else store.stats()).items():
            if name.rpartition(".")[2] not in COUNTERS:
                print(f"{name:16} {value}" + (f"  ({_readable(value)})" if name.endswith("_bytes") else ""))
    return 0


def clear(args: argparse.Namespace) -> int:
    """Empties a store, and removes it if it is a slab that nobody has open."""
    if args.url.startswith(REMOTE):
        with closing(open_store(args.url)) as store:
            assert isinstance(store, RemoteStore)
            print(f"{store.clear()} records removed from {store.name}")
        return 0
    kind, directory = slab_directory(args.url)
    if not os.path.lexists(directory):
        raise ValueError(f"store: there is none in {directory}")
    if slab.remove(directory):
        print(f"removed {directory}")
        return 0
    with closing(kind.open(directory, None)) as store:
        print(f"{store.clear()} records removed; {directory} stays, for processes have it open")
    return 0


def _on_store(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """The command, with one sentence and status 2 for a store that is none or cannot be opened."""

    def checked(args: argparse.Namespace) -> int:
        try:
            return run(args)
        except (ValueError, OSError, RuntimeError) as error:
            print(f"python -m lmcache_mm: {error}", file=sys.stderr)
            return 2

    return checked


def _readable(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lmcache_mm", description="KV-cache reuse for multimodal models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo_help = "questions about photographs, answered with KV cache from earlier ones"
    demo_parser = commands.add_parser("demo", help=demo_help, formatter_class=argparse.RawDescriptionHelpFormatter)
    demo.add_arguments(demo_parser)
    demo_parser.set_defaults(run=demo.run)
    for name, run, text in (
        ("stat", stat, "what a store holds"),
        ("clear", clear, "remove everything from a store, and a shm: or file: store itself if no process has it open"),
    ):
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        command.add_argument("url", metavar="URL", help="such as shm:///NAME or file:///DIR, capacity may be left out")
        command.set_defaults(run=_on_store(run))
    text = "what this machine offers, what is wrong with it, and how to mend that"
    commands.add_parser("doctor", help=text, description=text[0].upper() + text[1:] + ".").set_defaults(
        run=lambda _: doctor.run()
    )
    calibrate_parser = commands.add_parser("calibrate", help="measure which way transfers of a GPU are fastest")
    calibrate.add_arguments(calibrate_parser)
    calibrate_parser.set_defaults(run=calibrate.run)
    args = parser.parse_args(arguments)
    return int(args.run(args))
