"""s3: records as objects in a bucket of S3 or a server with its API, through obstore."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import S3Store

LISTED_AT_ONCE = 1000


_pid = 0  # the process that used the client first: a forked child lacks the client's threads


def connecting(
    bucket: str, prefix: str, endpoint: str | None, region: str | None, timeout_s: float
) -> Callable[[], S3Engine]:
    """Returns a function that makes a connection, with the credentials and settings in AWS_* environment variables.
    ValueError for an invalid endpoint."""
    global _pid  # noqa: PLW0603
    _pid = _pid or os.getpid()
    if os.getpid() != _pid:
        raise RuntimeError(
            f"store: s3: the client was used in process {_pid} and does not survive a fork: start this process by spawn"
        )
    settings: dict[str, Any] = {"region": region} if region else {}
    if endpoint:
        if not endpoint.startswith(("http://", "https://")):
            raise ValueError("store: endpoint: expected a URL that begins with http:// or https://")
        if endpoint.startswith("http://") and not _is_loopback(urlsplit(endpoint).hostname or ""):
            warnings.warn(
                "store: endpoint: http:// is not encrypted: credentials' signatures, names of records and payloads can "
                "be read on the network: use https://",
                stacklevel=2,
            )
        settings |= {"endpoint": endpoint, "virtual_hosted_style_request": False}
    timeout = timedelta(seconds=timeout_s)
    store = S3Store(
        bucket,
        prefix=prefix or None,
        unsigned_payload=True,  # records have their own MAC: no second pass over them
        client_options={
            **{"timeout": timeout, "connect_timeout": timeout},
            "allow_http": bool(endpoint and endpoint.startswith("http://")),
        },
        retry_config={"max_retries": 0},
        **settings,
    )
    engine = S3Engine(store)

    def connect() -> S3Engine:
        try:
            next(iter(obstore.list(store, chunk_size=1)), None)
        except (BaseError, FileNotFoundError) as error:
            if "NoSuchBucket" in str(error):
                raise ValueError(f"store: there is no bucket s3://{bucket}") from None
            if "status: 403" in str(error) or isinstance(error, (PermissionDeniedError, UnauthenticatedError)):
                raise PermissionError(
                    f"store: s3://{bucket} refuses the credentials of AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and so "
                    "on: they have to list the bucket, and to get, put and delete objects"
                ) from None
            raise
        return engine

    return connect


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class S3Engine:
    """See `Engine`."""

    expires = False

    def __init__(self, store: S3Store) -> None:
        self._store = store

    def exists(self, names: Sequence[str], peek: bool) -> list[bool]:
        async def look(name: str) -> bool:
            try:
                await obstore.head_async(self._store, name)
            except FileNotFoundError:
                return False
            return True

        return self._of_all(look, names)

    def _of_all(self, look: Callable[[str], Any], names: Sequence[str]) -> list[Any]:
        """Asks for all names concurrently."""

        async def gather() -> list[Any]:
            return await asyncio.gather(*(look(name) for name in names))

        return asyncio.run(gather())

    def read(self, name: str, into: memoryview) -> int | None:
        try:
            got = obstore.get(self._store, name)
        except FileNotFoundError:
            return None
        size: int = got.meta["size"]
        if size > len(into):
            return size
        array = np.frombuffer(into, np.uint8)
        begin = 0
        for piece in got.stream(min_chunk_size=1 << 20):
            part = np.frombuffer(piece, np.uint8)
            array[begin : begin + len(part)] = part
            begin += len(part)
        return begin

    def heads(self, names: Sequence[str], size: int) -> list[bytes | None]:
        async def look(name: str) -> bytes | None:
            try:
                return bytes(await obstore.get_range_async(self._store, name, start=0, length=size))
            except FileNotFoundError:
                return None

        return self._of_all(look, names)

    def write(self, name: str, record: memoryview, ttl_s: float, replace: bool) -> bool:
        obstore.put(self._store, name, record, use_multipart=False)
        return True

    def delete(self, names: Sequence[str]) -> None:
        obstore.delete(self._store, list(names))

    def names(self, prefix: str) -> Iterator[list[str]]:
        for listed in obstore.list(self._store, chunk_size=LISTED_AT_ONCE):
            names = [one["path"].rpartition("/")[2] for one in listed]
            yield [name for name in names if name.startswith(prefix)]

    def close(self) -> None:
        """Does nothing: there is nothing to close."""
