"""Gather and scatter on every layout, against reference.py and against plain indexing; other bytes stay untouched."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lmcache_mm as lmc
from layouts import PAGES, TOKENS, PagedCache, head_major, period_251, planes_apart, token_major
from lmcache_mm import ops, reference

VECTORS = json.loads(Path(__file__).with_name("vectors.json").read_text())
BLOCKS = [[], [3], [0, 6], [6, 2, 0, 5], [1, -1, 4], [-1], [0, 1, 2, 3, 4, 5, 6]]


def poison(cache: PagedCache) -> None:
    cache.memory.copy_(period_251(len(cache.memory)).flip(0) ^ 0x5A)


@pytest.mark.parametrize("block_ids", BLOCKS, ids=str)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_gathered_pages_equal_the_reference(paged, block_ids, dtype):
    out = torch.full((paged.layout.payload_bytes(len(block_ids)),), 0xEE, dtype=torch.uint8)
    assert ops.gather_pages(paged.layout, torch.tensor(block_ids, dtype=dtype), out) is out
    tokens = len(block_ids) * TOKENS
    assert torch.equal(out, reference.gather_pages(paged.layout, paged.memory, block_ids, tokens))


@pytest.mark.parametrize("block_ids", [ids for ids in BLOCKS if -1 not in ids], ids=str)
def test_gathered_pages_equal_plain_indexing_of_the_tensors(paged, block_ids):
    assert torch.equal(ops.gather_pages(paged.layout, block_ids), paged.expected(block_ids))


@pytest.mark.parametrize("block_ids", [ids for ids in BLOCKS if ids], ids=str)
@pytest.mark.parametrize("missing", range(1, TOKENS))
def test_slots_past_a_tail_are_gathered_as_zeros(dense, block_ids, missing):
    tokens = len(block_ids) * TOKENS - missing
    got = ops.gather_pages(dense.layout, block_ids, tokens=tokens)
    assert torch.equal(got, reference.gather_pages(dense.layout, dense.memory, block_ids, tokens))
    whole = ops.gather_pages(dense.layout, block_ids)
    zeroed = (got != whole).sum()
    assert zeroed <= len(dense.layout.planes) * dense.layout.row_bytes * missing
    assert block_ids[-1] == -1 or zeroed > 0.9 * len(dense.layout.planes) * dense.layout.row_bytes * missing


@pytest.mark.parametrize("block_ids", BLOCKS, ids=str)
def test_scattered_pages_equal_the_reference_and_nothing_else_changes(paged, block_ids):
    payload = period_251(paged.layout.payload_bytes(len(block_ids)) + 3)[3:]
    poison(paged)
    want = paged.memory.clone()
    layout_at_want = PagedCache(want, paged.layout, paged.expected)
    ops.scatter_pages(paged.layout, block_ids, payload)
    shifted = shift(paged.layout, want.data_ptr() - paged.memory.data_ptr())
    reference.scatter_pages(shifted, layout_at_want.memory, block_ids, payload)
    assert torch.equal(paged.memory, want)


def shift(layout: lmc.KVLayout, by: int) -> lmc.KVLayout:
    """The same layout, moved to other addresses."""
    fields = ("num_pages", "page_stride", "page_tokens", "runs", "run_stride", "run_bytes", "token_bytes", "device")
    return lmc.KVLayout(
        planes=tuple(plane + by for plane in layout.planes), **{name: getattr(layout, name) for name in fields}
    )


SLOTS = [[], [0], [PAGES * TOKENS - 1, 3, 4], [5, -1, 6, 0], list(range(PAGES * TOKENS))[::-1]]


@pytest.mark.parametrize("slots", SLOTS, ids=lambda s: str(s[:5]))
def test_gathered_tokens_equal_the_reference(dense, slots):
    got = ops.gather_tokens(dense.layout, slots)
    assert torch.equal(got, reference.gather_tokens(dense.layout, dense.memory, slots))


@pytest.mark.parametrize("slots", SLOTS, ids=lambda s: str(s[:5]))
def test_scattered_tokens_equal_the_reference_and_nothing_else_changes(dense, slots):
    payload = period_251(len(dense.layout.planes) * len(slots) * dense.layout.row_bytes)
    poison(dense)
    want = dense.memory.clone()
    ops.scatter_tokens(dense.layout, slots, payload)
    reference.scatter_tokens(shift(dense.layout, want.data_ptr() - dense.memory.data_ptr()), want, slots, payload)
    assert torch.equal(dense.memory, want)


def test_token_payloads_are_rows_of_the_tensors():
    cache = head_major()
    tensors = cache.layout.tensors
    got = ops.gather_tokens(cache.layout, [9, 2]).view(torch.float16).view(2, 2, 3, 16)
    for layer, tensor in enumerate(tensors):
        assert torch.equal(got[layer, 0].view(torch.int16), tensor[2, :, 1].view(torch.int16))
        assert torch.equal(got[layer, 1].view(torch.int16), tensor[0, :, 2].view(torch.int16))


def test_many_chunks_in_one_call_equal_one_call_each(paged):
    chunks = [[3, 1], [], [0], [-1, 6, 2]]
    sums = torch.zeros(4, dtype=torch.int64)
    together = ops.gather_pages(paged.layout, chunks, checksums=sums)
    for chunk, payload, total in zip(chunks, together, sums, strict=True):
        assert torch.equal(payload, ops.gather_pages(paged.layout, chunk))
        assert total == ops.checksum(payload)
    before = paged.memory.clone()
    paged.memory.zero_()
    assert ops.scatter_pages(paged.layout, chunks, together, checksums=sums).all()
    pages = [page for chunk in chunks for page in chunk if page >= 0]
    after = ops.gather_pages(paged.layout, pages)
    paged.memory.copy_(before)
    assert torch.equal(after, ops.gather_pages(paged.layout, pages))


def test_many_chunks_may_have_tails_of_their_own():
    cache = token_major()
    chunks, tokens = [[3, 1], [0]], [5, 4]
    for got, ids, n in zip(ops.gather_pages(cache.layout, chunks, tokens=tokens), chunks, tokens, strict=True):
        assert torch.equal(got, reference.gather_pages(cache.layout, cache.memory, ids, n))


# --- checksums


@pytest.mark.parametrize("case", VECTORS["checksums"], ids=lambda c: str(c["bytes"]))
def test_checksums_are_the_golden_ones(case):
    assert ops.checksum(period_251(case["bytes"])) == case["checksum"]


@given(st.binary(max_size=200))
def test_checksums_equal_the_reference(data):
    payload = torch.tensor(list(data), dtype=torch.uint8)
    assert ops.checksum(payload) == reference.checksum(payload)


@settings(max_examples=30, deadline=None)
@given(st.integers(17, 600), st.integers(0, 2**32 - 1))
def test_a_checksum_detects_every_flipped_bit_swapped_shifted_or_dropped_lane(size, seed):
    rng = np.random.default_rng(seed)
    payload = rng.integers(0, 256, size, dtype=np.uint8)
    right = ops.checksum(payload)
    changed = []
    for bit in range(0, 8 * size, 7):
        flipped = payload.copy()
        flipped[bit // 8] ^= 1 << bit % 8
        changed.append(flipped)
    for lane in range(size // 16 - 1):
        swapped = payload.copy()
        swapped[16 * lane : 16 * lane + 32] = np.roll(payload[16 * lane : 16 * lane + 32], 16)
        changed += [swapped, np.delete(payload, range(16 * lane, 16 * lane + 16))]
    changed += [np.roll(payload, 16), payload[:-1], np.append(payload, np.uint8(0))]
    sums = [ops.checksum(np.ascontiguousarray(c)) for c in changed if not np.array_equal(c, payload)]
    assert right not in sums
    assert len(set(sums)) == len({c.tobytes() for c in changed if not np.array_equal(c, payload)})


def test_checksums_of_zeros_differ_by_length():
    assert len({ops.checksum(torch.zeros(n, dtype=torch.uint8)) for n in range(1000)}) == 1000


def test_scatter_tells_which_payload_is_damaged(paged):
    chunks = [[0, 1], [2], [3]]
    sums = torch.zeros(3, dtype=torch.int64)
    payloads = ops.gather_pages(paged.layout, chunks, checksums=sums)
    payloads[1][-1] ^= 1
    assert ops.scatter_pages(paged.layout, chunks, payloads, checksums=sums).tolist() == [True, False, True]


# --- layouts


def test_layers_that_are_neighbours_in_every_page_join_to_one_run():
    memory = torch.zeros(5, 3, 4, 8, dtype=torch.int8)
    layout = lmc.KVLayout.from_tensors([memory[:, i] for i in range(3)], page_tokens=4, page_dim=0, token_dim=1)
    assert (len(layout.planes), layout.runs, layout.run_bytes, layout.token_bytes) == (1, 1, 96, 8)


def test_layers_with_a_gap_between_them_stay_apart():
    memory = torch.zeros(5, 3, 4, 9, dtype=torch.int8)[..., :8]
    layout = lmc.KVLayout.from_tensors([memory[:, i] for i in range(3)], page_tokens=4, page_dim=0, token_dim=1)
    assert (len(layout.planes), layout.runs, layout.run_bytes) == (3, 4, 8)


def test_layers_that_share_their_bytes_are_kept_once():
    a, b = torch.zeros(2, 5, 4, 8)
    layout = lmc.KVLayout.from_tensors({"a": a, "b": b, "c": a}, page_tokens=4, page_dim=0, token_dim=1)
    assert (len(layout.planes), layout.layers) == (2, ("a", "b"))


def test_a_page_of_one_token_has_its_page_as_row():
    tensor = torch.arange(5 * 6, dtype=torch.uint8).view(5, 1, 6)
    layout = lmc.KVLayout.from_tensors([tensor], page_tokens=1, page_dim=0, token_dim=1)
    assert ops.gather_tokens(layout, [3]).tolist() == tensor[3, 0].tolist()


def test_a_cache_of_one_page_has_its_outer_dimensions_inside_the_page():
    tensor = period_251(2 * 4 * 6).view(2, 1, 4, 6)
    layout = lmc.KVLayout.from_tensors([tensor], page_tokens=4, page_dim=1, token_dim=2)
    assert torch.equal(ops.gather_pages(layout, [0]), tensor.reshape(-1))


def test_fingerprints_tell_layouts_chunks_and_modes_apart(paged):
    prints = {paged.layout.fingerprint(c, m) for c in (16, 32) for m in ("page", "token")}
    assert len(prints) == 4
    others = {make().layout.fingerprint(16) for make in (token_major, planes_apart, head_major)}
    assert len(others) == 3


def test_fingerprints_do_not_depend_on_addresses_strides_between_pages_or_number_of_pages():
    a = lmc.KVLayout.from_tensors([torch.zeros(5, 4, 8)], page_tokens=4, page_dim=0, token_dim=1)
    b = lmc.KVLayout.from_tensors([torch.zeros(9, 6, 8)[:, :4]], page_tokens=4, page_dim=0, token_dim=1)
    assert a.fingerprint(16) == b.fingerprint(16)


def test_fingerprints_of_equal_sizes_with_dimensions_in_another_order_differ():
    a = lmc.KVLayout.from_tensors([torch.zeros(5, 4, 4, 8)], page_tokens=4, page_dim=0, token_dim=1)
    b = lmc.KVLayout.from_tensors([torch.zeros(5, 4, 4, 8)], page_tokens=4, page_dim=0, token_dim=2)
    c = lmc.KVLayout.from_tensors([torch.zeros(5, 4, 4, 8, dtype=torch.int32)], page_tokens=4, page_dim=0, token_dim=1)
    assert len({a.fingerprint(16), b.fingerprint(16), c.fingerprint(16)}) == 3


def test_offsets_beyond_32_bits_reach_the_right_bytes():
    memory = torch.empty(5 << 30, dtype=torch.uint8)  # only touched pages take memory
    tensor = memory.view(5, 1 << 30)[:, :64].view(5, 4, 16)
    layout = lmc.KVLayout.from_tensors([tensor], page_tokens=4, page_dim=0, token_dim=1)
    payload = period_251(128)
    ops.scatter_pages(layout, [4, 2], payload)
    assert torch.equal(memory[4 << 30 : (4 << 30) + 64], payload[:64])
    assert torch.equal(memory[2 << 30 : (2 << 30) + 64], payload[64:])
    assert torch.equal(ops.gather_pages(layout, [4, 2]), payload)
    assert torch.equal(ops.gather_tokens(layout, [4 * 4 + 3]), payload[48:64])


# --- bad input


@pytest.fixture
def cache():
    return token_major()


@pytest.mark.parametrize(
    "block_ids, error, text",
    [
        ([PAGES], ValueError, rf"block_ids\[0\]: expected an id in \[0, {PAGES}\), or -1 to skip, got {PAGES}"),
        ([0, -2], ValueError, r"block_ids\[1\]: expected .* got -2"),
        ([[0], [1, 99]], ValueError, r"block_ids\[1\]\[1\]: expected .* got 99"),
        ([0.5], TypeError, "block_ids: expected integers, got float64"),
        (torch.tensor([0.5]), TypeError, "block_ids: expected int32 or int64, got torch.float32"),
        (torch.zeros(1, 1, dtype=torch.int64), ValueError, "block_ids: expected 1 dimension"),
        (torch.zeros(1, dtype=torch.int64, device="meta"), ValueError, "block_ids: expected a tensor on cpu"),
    ],
)
def test_bad_block_ids_are_refused_and_nothing_is_written(cache, block_ids, error, text):
    before = cache.memory.clone()
    with pytest.raises(error, match=text):
        ops.gather_pages(cache.layout, block_ids)
    parts = len(block_ids) if isinstance(block_ids, list) and isinstance(block_ids[0], list) else 0
    payloads = (
        [torch.zeros(cache.layout.payload_bytes(len(b)), dtype=torch.uint8) for b in block_ids] if parts else None
    )
    size = len(block_ids) if isinstance(block_ids, list) else 1
    with pytest.raises(error, match=text):
        ops.scatter_pages(
            cache.layout, block_ids, payloads or torch.zeros(cache.layout.payload_bytes(size), dtype=torch.uint8)
        )
    assert torch.equal(cache.memory, before)


@pytest.mark.parametrize(
    "payload, error, text",
    [
        (torch.zeros(5, dtype=torch.uint8), ValueError, r"payload: expected \d+ contiguous bytes, got shape \(5,\)"),
        (torch.zeros(2304, dtype=torch.int8), TypeError, "payload: expected uint8, got torch.int8"),
        (torch.zeros(4608, dtype=torch.uint8)[::2], ValueError, "payload: expected 2304 contiguous bytes"),
        ([torch.zeros(2304, dtype=torch.uint8)], TypeError, "payload: expected one payload"),
        (torch.zeros(2304, dtype=torch.uint8, device="meta"), ValueError, "payload: expected a tensor on cpu"),
    ],
)
def test_bad_payloads_are_refused(cache, payload, error, text):
    assert cache.layout.payload_bytes(1) == 2304
    before = cache.memory.clone()
    with pytest.raises(error, match=text):
        ops.scatter_pages(cache.layout, [0], payload)
    assert torch.equal(cache.memory, before)


@pytest.mark.parametrize(
    "call, error, text",
    [
        (
            lambda la: ops.gather_pages(la, [0, 1], tokens=4),
            ValueError,
            "tokens: expected the tokens of 2 pages, got 4",
        ),
        (lambda la: ops.gather_pages(la, [0], tokens=[4]), ValueError, "tokens: expected one integer"),
        (lambda la: ops.gather_pages(la, [[0]], tokens=4), ValueError, "tokens: expected one per chunk"),
        (lambda la: ops.gather_pages(la, [0], checksums=torch.zeros(2, dtype=torch.int64)), ValueError, "checksums"),
        (lambda la: ops.gather_pages(la, [0], checksums=torch.zeros(1)), ValueError, "checksums: expected contiguous"),
        (lambda la: ops.gather_pages("layout", [0]), TypeError, "layout: expected lmcache_mm.KVLayout, got str"),
        (lambda la: ops.gather_tokens(la, [PAGES * TOKENS]), ValueError, r"slots\[0\]: expected an id in"),
        (lambda la: ops.gather_pages(la, [[0], 5]), TypeError, r"block_ids\[1\]: expected a list of integers, .* int"),
        (lambda la: ops.gather_pages(la, None), TypeError, "block_ids: expected a list of integers, .*, got NoneType"),
        (lambda la: ops.scatter_pages(la, [0], []), TypeError, "payload: expected one payload, got list"),
        (
            lambda la: ops.scatter_pages(la, [[0], [1]], []),
            ValueError,
            "payload: expected 2 payloads, one per chunk, got 0",
        ),
        (lambda la: ops.gather_tokens(la, [-2]), ValueError, r"slots\[0\]: expected an id in"),
        (lambda la: ops.gather_pages(la, [0], threads=-1), ValueError, "threads: expected an integer in"),
        (lambda la: ops.checksum(torch.zeros(3)), TypeError, "payload: expected contiguous uint8"),
    ],
)
def test_other_bad_arguments_of_copies_are_refused(cache, call, error, text):
    with pytest.raises(error, match=text):
        call(cache.layout)


def test_read_only_memory_is_not_gathered_into(cache):
    out = np.zeros(cache.layout.payload_bytes(1), np.uint8)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="out: expected writable memory"):
        ops.gather_pages(cache.layout, [0], out)


def test_checksums_that_are_read_only_are_not_filled_but_compared(cache):
    payload, sums = ops.gather_pages(cache.layout, [0]), np.zeros(1, np.int64)
    ops.gather_pages(cache.layout, [0], checksums=sums)
    sums.flags.writeable = False
    with pytest.raises(ValueError, match="checksums: expected writable memory"):
        ops.gather_pages(cache.layout, [0], checksums=sums)
    assert ops.scatter_pages(cache.layout, [0], payload, checksums=sums).all()


def test_a_tensor_whose_memory_was_freed_is_refused_before_it_is_touched(cache):
    def freed(dtype, *shape):
        tensor = torch.zeros(*shape, dtype=dtype)
        tensor.untyped_storage().resize_(tensor.nbytes - 1 if tensor.nbytes < 100 else 0)
        return tensor

    size = cache.layout.payload_bytes(1)
    for name, call in {
        "out": lambda: ops.gather_pages(cache.layout, [0], freed(torch.uint8, size)),
        "payload": lambda: ops.scatter_pages(cache.layout, [0], freed(torch.uint8, size)),
        "checksums": lambda: ops.gather_pages(cache.layout, [0], checksums=freed(torch.int64, 1)),
        "block_ids": lambda: ops.gather_pages(cache.layout, freed(torch.int64, 1)),
        "token_ids": lambda: ops.prefix_keys(freed(torch.int32, 200), [], bytes(32), [200]),
        r"kv_caches\[0\]": lambda: lmc.KVLayout.from_tensors(
            [freed(torch.half, 3, 4, 8)], page_tokens=4, page_dim=0, token_dim=1
        ),
        "output": lambda: lmc.EncoderCache("mem://?capacity=1MiB", lmc.Namespace()).save("a", freed(torch.half, 99)),
    }.items():
        with pytest.raises(ValueError, match=f"{name}: expected a storage of"):
            call()
    assert ops.checksum(torch.zeros(0, dtype=torch.uint8)) == ops.checksum(torch.zeros(2, dtype=torch.uint8)[2:])


LAYOUT_ARGUMENTS = st.fixed_dictionaries(
    {
        "page_tokens": st.integers(-2, 5) | st.sampled_from([1 << 63, 4.0, "4", None]),
        "page_dim": st.integers(-4, 4) | st.sampled_from([1 << 70, None, True]),
        "token_dim": st.integers(-4, 4) | st.none() | st.just("x"),
        "opaque": st.booleans(),
    }
)


@settings(max_examples=300, deadline=None)
@given(st.data(), LAYOUT_ARGUMENTS)
def test_any_tensors_make_a_layout_that_lies_within_their_memory_or_are_refused(data, arguments):
    shape = data.draw(st.lists(st.integers(0, 4), max_size=4))
    strides = data.draw(st.lists(st.integers(0, 300), min_size=len(shape), max_size=len(shape)))
    dtype = data.draw(st.sampled_from([torch.uint8, torch.float16, torch.float64, torch.bool, torch.complex64]))
    memory = torch.zeros(6000, dtype=dtype)
    layers = [
        memory.as_strided(shape, strides, offset) for offset in data.draw(st.lists(st.integers(0, 500), max_size=3))
    ]
    try:
        layout = lmc.KVLayout.from_tensors(layers, **arguments)
    except (TypeError, ValueError):
        return
    begin, end = memory.data_ptr(), memory.data_ptr() + memory.nbytes
    extent = (
        max(0, layout.num_pages - 1) * layout.page_stride + (layout.runs - 1) * layout.run_stride + layout.run_bytes
    )
    if layout.num_pages:
        assert all(begin <= plane and plane + extent <= end for plane in layout.planes)
        pages = list(range(layout.num_pages))
        payload = torch.arange(layout.payload_bytes(len(pages))).to(torch.uint8)
        ops.scatter_pages(layout, pages, payload)
        assert len(layers) > 1 or torch.equal(ops.gather_pages(layout, pages), payload)


def test_opaque_pages_have_no_tokens_to_copy_and_no_tails():
    layout = lmc.KVLayout.from_tensors([torch.zeros(3, 50)], page_tokens=4, page_dim=0, opaque=True)
    with pytest.raises(ValueError, match="layout: expected one with a token dimension"):
        ops.gather_tokens(layout, [0])
    with pytest.raises(ValueError, match="tokens: expected whole pages of an opaque layout, got 3"):
        ops.gather_pages(layout, [0], tokens=3)


@pytest.mark.parametrize(
    "tensors, options, error, text",
    [
        ([], {}, ValueError, "kv_caches: expected at least one tensor"),
        ([torch.zeros(2, 4, 8), torch.zeros(3, 4, 8)], {}, ValueError, r"kv_caches\[1\]: expected shape"),
        ([torch.zeros(2, 4, 8), torch.zeros(2, 4, 8).half()], {}, ValueError, r"kv_caches\[1\]: expected dtype"),
        ([torch.zeros(2, 4, 8), torch.zeros(2, 4, 9)[..., :8]], {}, ValueError, r"kv_caches\[1\]: expected strides"),
        ([torch.zeros(2, 5, 8)], {}, ValueError, "page_tokens: expected 5, the size of dimension 1, got 4"),
        ([torch.zeros(2, 4, 8)], {"token_dim": 0}, ValueError, "token_dim: expected another dimension than page_dim"),
        ([torch.zeros(2, 4, 8)], {"token_dim": 3}, ValueError, "token_dim: expected a dimension of a tensor of 3"),
        ([torch.zeros(2, 4, 8)], {"token_dim": None}, ValueError, "token_dim: expected a dimension, or opaque=True"),
        ([torch.zeros(2, 4, 8)], {"opaque": True}, ValueError, "token_dim: expected a dimension, or opaque=True"),
        ([torch.zeros(2, 1, 8).expand(2, 4, 8)], {}, ValueError, "kv_caches: expected elements that do not overlap"),
        ([torch.zeros(99).as_strided((2, 4, 8), (10, 8, 1))], {}, ValueError, "kv_caches: expected elements that"),
        ([torch.zeros(4, 2, 8).transpose(0, 1)], {}, ValueError, "token_dim: the slots of dimension 1 do not lie"),
        (["x"], {}, TypeError, r"kv_caches\[0\]: expected a torch tensor"),
        (None, {}, TypeError, "kv_caches: expected a list or dict of tensors, one per layer, got NoneType"),
        (
            torch.zeros(2, 8, 4, 16),
            {},
            TypeError,
            "kv_caches: expected a list .* of tensors, one per layer, got Tensor",
        ),
        (
            [torch.zeros(2, 4, 8, device="meta")],
            {},
            ValueError,
            r"kv_caches\[0\]: expected a tensor on cpu or cuda, got",
        ),
    ],
)
def test_tensors_that_make_no_layout_are_refused(tensors, options, error, text):
    with pytest.raises(error, match=text):
        lmc.KVLayout.from_tensors(tensors, **{"page_tokens": 4, "page_dim": 0, "token_dim": 1, **options})


@pytest.mark.parametrize(
    "change, text",
    [
        ({"planes": ()}, "planes: expected at least one"),
        ({"page_tokens": 0}, "page_tokens: expected at least 1"),
        ({"page_stride": 60}, "page_stride: expected at least the page's extent 64, got 60"),
        ({"runs": 2, "run_stride": 8}, "run_stride: expected at least run_bytes"),
        ({"token_bytes": 24}, "token_bytes: expected page_tokens"),
        ({"num_pages": 1 << 60}, r"exceeds 2\*\*62 bytes"),
    ],
)
def test_layouts_by_addresses_are_checked(change, text):
    fields = dict(
        planes=(0,), num_pages=2, page_stride=64, page_tokens=4, runs=1, run_stride=0, run_bytes=64, token_bytes=16
    )
    lmc.KVLayout(**fields)
    with pytest.raises(ValueError, match=text):
        lmc.KVLayout(**{**fields, **change})


def test_the_checksum_factor_has_the_bits_that_make_half_word_changes_show():
    header = (Path(__file__).parent.parent / "csrc" / "checksum.h").read_text()
    factor = int(header.split("kHighFactor = ")[1].split(";")[0], 16)
    assert -factor >> 32 & 1
    assert -pow(factor, -1, 2**64) >> 32 & 1
