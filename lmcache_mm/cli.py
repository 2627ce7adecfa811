"""The command line: python -m lmcache_mm COMMAND."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from lmcache_mm import demo


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lmcache_mm", description="KV-cache reuse for multimodal models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo_help = "questions about photographs, answered with KV cache from earlier ones"
    demo_parser = commands.add_parser("demo", help=demo_help, formatter_class=argparse.RawDescriptionHelpFormatter)
    demo.add_arguments(demo_parser)
    demo_parser.set_defaults(run=demo.run)
    args = parser.parse_args(arguments)
    return int(args.run(args))
