"""The compiled module: raw addresses and counts, nothing checked twice. Use lmcache_mm.ops."""

from collections.abc import Callable, Iterable, Sequence

cuda_version: str  # of the nvcc that built it, "" for CPU operations only
cuda_archs: str  # compute capabilities with machine code, such as "80,90,100,120"

class PagedCache:
    def __init__(
        self,
        planes: Sequence[int],
        num_pages: int,
        page_stride: int,
        page_bytes: int,
        run_bytes: int,
        run_stride: int,
        page_tokens: int,
        token_bytes: int,
    ) -> None: ...

def simd_variants() -> list[str]: ...
def use_simd(name: str) -> None: ...
def apply_mm_hashes_to_token_ids(token_ids: int, count: int, items: Iterable[tuple[str, str, int, int]]) -> None: ...
def prefix_keys(
    token_ids: int,
    count: int,
    wide: bool,
    items: Iterable[tuple[str, str, int, int]],
    root: bytes,
    cuts: int,
    num_cuts: int,
    keys: int,
) -> None: ...

class RunningKeys:
    def __init__(self, items: Iterable[tuple[str, str, int, int]], root: bytes) -> None: ...
    @property
    def tokens(self) -> int: ...
    def extend(self, token_ids: int, count: int, wide: bool, cuts: int, num_cuts: int, keys: int) -> None: ...

def gather(
    cache: PagedCache,
    token_mode: bool,
    chunks: Iterable[tuple[int, bool, int, int, int, int]],
    checksums: int,
    threads: int,
) -> None: ...
def scatter(
    cache: PagedCache,
    token_mode: bool,
    chunks: Iterable[tuple[int, bool, int, int, int, int]],
    checksums: int,
    threads: int,
) -> None: ...
def gather_coded(
    cache: PagedCache, chunks: Iterable[tuple[int, bool, int, int, int, int]], sums: int, threads: int
) -> None: ...
def scatter_coded(
    cache: PagedCache, chunks: Iterable[tuple[int, bool, int, int, int, int]], sums: int, threads: int
) -> None: ...
def coded_plane_bytes(raw_bytes: int) -> int: ...
def checksum(payload: int, bytes: int) -> int: ...
def checksum_part(part: int, bytes: int, offset: int, payload_bytes: int) -> int: ...
def copy(to: int, source: int, bytes: int, threads: int) -> int: ...
def read_pages(address: int, bytes: int) -> None: ...

# See csrc/slab_index.h. Terms: seconds since the machine's start, since 1970, to wait for others, and until a record
# counts as gone (0: never); most bytes of an owner (0: any). TimeoutError: the lock could not be had; nothing was done.
_Terms = tuple[float, float, float, float, int]

def slab_table_bytes(granules: int, granule_bytes: int, segment_granules: int) -> int: ...
def slab_header(page: bytes) -> tuple[int, int, int, bytes] | None: ...

class SlabPages:
    def __init__(self, address: int, bytes: int) -> None: ...
    def lost(self) -> bool: ...

class SlabIndex:
    def __init__(
        self,
        file: int,
        pages: SlabPages,
        granules: int,
        granule_bytes: int,
        segment_granules: int,
        lock_fd: int,
        lock_byte: int,
        row: int,
    ) -> None: ...
    def open(self, boot_id: bytes, keep: bool, terms: _Terms) -> None: ...
    def close(self, terms: _Terms) -> None: ...
    def contains(self, keys: Sequence[bytes], peek: bool, now: float, ttl: float) -> list[bool]: ...
    def ages(self, keys: Sequence[bytes], now: float, ttl: float) -> list[float]: ...
    def lend(
        self, keys: Sequence[bytes], sizes: Sequence[int], peek: bool, now: float, ttl: float
    ) -> list[tuple[int, int, int, bytes] | None]: ...
    def hold(self, keys: Sequence[bytes], now: float, ttl: float) -> list[int]: ...
    def unpin(self, starts: Sequence[int]) -> None: ...
    def find(self, key: bytes, now: float) -> tuple[int, int, bool] | None: ...
    def take_visited(self, start: int) -> bool: ...
    def moment(self) -> int: ...
    def rows_taken(self) -> int: ...
    def sizes(self) -> dict[str, int]: ...
    def reserve(
        self,
        keys: Sequence[bytes],
        sizes: Sequence[int],
        owner: bytes,
        given_back: Sequence[tuple[int, int]],
        terms: _Terms,
    ) -> tuple[list[tuple[int, int] | None], int, int, int]: ...
    def publish(self, puts: Sequence[tuple[bytes, int, int, int, int, float]], terms: _Terms) -> int: ...
    def abandon(self, places: Sequence[tuple[int, int]], terms: _Terms) -> int: ...
    def remove(self, keys: Sequence[bytes], terms: _Terms) -> int: ...
    def discard(self, key: bytes, start: int, generation: int, terms: _Terms) -> None: ...
    def forget(self, owner: bytes, terms: _Terms) -> int: ...
    def clear(self, terms: _Terms) -> int: ...
    def bury(self, rows: int, terms: _Terms) -> None: ...
    def check(self, terms: _Terms) -> str: ...

# Only in builds with CUDA kernels. `upload` copies a table to the device and returns its address.

def cuda_devices() -> tuple[int, str]: ...

class CudaEvent:
    def __init__(self, device: int, stream: int) -> None: ...
    def wait(self) -> None: ...

class CudaTransfer:
    def __init__(self, *args: object, **kwargs: object) -> None: ...
    def go_on(self, planes: int, behind: CudaEvent | None = None) -> None: ...
    def order(self, stream: int, planes: int) -> None: ...
    def wait(self) -> list[int]: ...

class CudaStaging:
    def __init__(
        self, device: int, ring: int, buffer_bytes: int, buffers: int, urgent: bool, max_blocks: int
    ) -> None: ...
    def store(
        self,
        cache: PagedCache,
        chunks: Iterable[tuple[int, bool, int, int, int, int]],
        ends: Sequence[int],
        checksums: bool,
        fragment_bytes: int,
        kernel_blocks: int,
        coded: Sequence[bool] = (),
    ) -> CudaTransfer: ...
    def load(
        self,
        cache: PagedCache,
        chunks: Iterable[tuple[int, bool, int, int, int, int]],
        ends: Sequence[int],
        checksums: bool,
        behind: CudaEvent,
        fragment_bytes: int,
        kernel_blocks: int,
        coded: Sequence[bool] = (),
    ) -> CudaTransfer: ...

def cuda_register_host(device: int, address: int, bytes: int, piece_bytes: int) -> None: ...
def cuda_unregister_host(device: int, address: int, bytes: int, piece_bytes: int) -> None: ...
def cuda_apply_mm_hashes_to_token_ids(
    token_ids: int,
    count: int,
    items: Iterable[tuple[str, str, int, int]],
    device: int,
    stream: int,
    upload: Callable[[bytes], int],
) -> None: ...
def cuda_prefix_keys_workspace_bytes(count: int, num_cuts: int) -> int: ...
def cuda_prefix_keys(
    token_ids: int,
    count: int,
    wide: bool,
    items: Iterable[tuple[str, str, int, int]],
    root: bytes,
    cuts: int,
    num_cuts: int,
    keys: int,
    workspace: int,
    device: int,
    stream: int,
    upload: Callable[[bytes], int],
) -> None: ...
def cuda_gather(
    cache: PagedCache,
    token_mode: bool,
    chunks: Iterable[tuple[int, bool, int, int, int, int]],
    host_ids: bool,
    checksums: int,
    device: int,
    stream: int,
    upload: Callable[[bytes], int],
    max_blocks: int,
) -> None: ...
def cuda_scatter(
    cache: PagedCache,
    token_mode: bool,
    chunks: Iterable[tuple[int, bool, int, int, int, int]],
    host_ids: bool,
    checksums: int,
    device: int,
    stream: int,
    upload: Callable[[bytes], int],
    max_blocks: int,
) -> None: ...
