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
def checksum(payload: int, bytes: int) -> int: ...
def checksum_part(part: int, bytes: int, offset: int, payload_bytes: int) -> int: ...
def copy(to: int, source: int, bytes: int, threads: int) -> int: ...
def read_pages(address: int, bytes: int) -> None: ...

class SlabTable:
    def __init__(self, slots: int, row: int) -> None: ...
    def generation(self, slot: int) -> int: ...
    def set_generation(self, slot: int, generation: int) -> None: ...
    def touch(self, contents: Sequence[tuple[int, int]]) -> list[bool]: ...
    def pin(self, contents: Sequence[tuple[int, int]]) -> list[bool]: ...
    def unpin(self, slots: Sequence[int]) -> None: ...
    def pinned(self, slot: int) -> bool: ...
    def evict(self, slot: int) -> bool: ...
    def retire(self, slot: int) -> None: ...
    def take_visited(self, slot: int) -> bool: ...
    def clear_row(self, row: int, num_slots: int) -> None: ...

# Only in builds with CUDA kernels. `upload` copies a table to the device and returns its address.

def cuda_devices() -> tuple[int, str]: ...

class CudaEvent:
    def __init__(self, device: int, stream: int) -> None: ...

class CudaTransfer:
    def __init__(self, *args: object, **kwargs: object) -> None: ...
    def go_on(self, planes: int, behind: CudaEvent | None = None) -> None: ...
    def order(self, stream: int, planes: int) -> None: ...
    def finished(self) -> bool: ...
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
