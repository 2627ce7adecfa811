"""Two hosts, played by two processes: one lends its shared memory, the other reads it over the network."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
import uuid

import torch

import lmcache_mm as lmc

PROMPT = lmc.Prompt([1] * 20 + [99] * 300 + [5] * 30, [lmc.Item("hash of the picture", offset=20, length=300)])


def cache_on(store: str) -> tuple[torch.Tensor, lmc.KVCache]:
    pages = torch.zeros(32, 16, 64)
    layout = lmc.KVLayout.from_tensors([pages], page_tokens=16, page_dim=0, token_dim=1)
    return pages, lmc.KVCache(layout, store, lmc.Namespace(model="my-model"))


def main() -> None:
    os.environ.setdefault("LMCACHE_MM_SECRET", secrets.token_hex(16))  # the same on both hosts
    lent = f"shm:///example-{uuid.uuid4().hex}"
    command = [sys.executable, "-c", "from lmcache_mm.commands.cli import main; raise SystemExit(main())"]
    try:
        pages, cache = cache_on(f"{lent}?capacity=16MiB")
        with cache:
            pages.normal_()
            cache.store(PROMPT, list(range(22))).result()
            # Beyond loopback, use --tls and ?tls= with a directory made by `lmcache-mm certificates`.
            serve = [*command, "serve", "--store", lent, "--listen", "127.0.0.1:0"]
            with subprocess.Popen(serve, stdout=subprocess.PIPE, text=True) as server:
                try:
                    assert server.stdout
                    address = re.search(r"lent at (\S+:\d+),", server.stdout.readline())
                    if not address:
                        raise SystemExit(server.wait())  # it has said why
                    there, reader = cache_on(f"peer://{address[1]}")
                    with reader:
                        restored = reader.retrieve(PROMPT, list(range(22))).result()
                finally:
                    server.terminate()
            assert torch.equal(there.flatten(0, 1)[:restored], pages.flatten(0, 1)[:restored])
            print(f"{restored} of {len(PROMPT)} tokens read from the other host")
    finally:
        subprocess.run([*command, "clear", lent], check=True, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
