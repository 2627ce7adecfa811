"""The codec "split": every bit pattern survives, every variant equals the reference, and no bytes do harm."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lmcache_mm as lmc
from lmcache_mm import _C, codec, encoder_cache, ops, reference
from lmcache_mm.layout import KVLayout
from lmcache_mm.stores.tiered_slots import TieredSlotStore
from test_stores import new_store

VECTORS = json.loads(Path(__file__).with_name("vectors.json").read_text())
TILE_BYTES = 2 * reference.TILE_NUMBERS


@pytest.fixture(params=_C.simd_variants())
def variant(request):
    _C.use_simd(request.param)
    yield request.param
    _C.use_simd(_C.simd_variants()[0])


def as_bytes(numbers: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(numbers.astype(np.uint16).view(np.uint8).copy())


def like_kv(count: int, seed: int = 0, spread: float = 1.0) -> torch.Tensor:
    """uint8 [2 * count]: bf16 numbers as KV has them, a normal distribution."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, generator=generator) * spread).bfloat16().view(torch.uint8)


def check_round_trip(raw: torch.Tensor) -> bool:
    """Whether it is coded; what is coded is as the reference says, and comes back."""
    coded, expected = codec.encode(raw), reference.encode_payload(raw, 1)
    assert (coded is None) == (expected is None)
    if coded is None:
        return False
    assert coded.numpy().tobytes() == expected
    assert codec.coded_bytes(1, len(raw)) == len(coded)
    back = torch.full_like(raw, 0xEE)
    assert codec.decode(back, coded)
    assert torch.equal(back, raw)
    return True


@pytest.mark.parametrize("case", VECTORS["codec"], ids=lambda case: case["name"])
def test_coded_tiles_are_the_golden_ones(case):
    numbers = np.frombuffer(bytes.fromhex(case["raw"]), np.uint16)
    tile = reference.encode_tile(numbers)
    assert (None if tile is None else tile.hex()) == case["tile"]
    if tile is not None:
        assert np.array_equal(reference.decode_tile(tile, len(numbers)), numbers)
        payload = bytes(codec.HEADER_BYTES) + tile
        back = torch.empty(2 * len(numbers), dtype=torch.uint8)
        codec.decode(back, torch.frombuffer(bytearray(payload), dtype=torch.uint8))
        assert back.numpy().tobytes().hex() == case["raw"]


def test_every_bit_pattern_survives_in_every_position_of_a_tile(variant):
    """A tile of each exponent's 256 patterns, eight times over, turned by one place at a time: each of the 65,536
    patterns comes to lie in each of the 2,048 places."""
    for exponent in range(256):
        patterns = np.arange(256, dtype=np.uint16)
        numbers = (patterns & 0x80) << 8 | exponent << 7 | (patterns & 0x7F)
        turned = np.lib.stride_tricks.sliding_window_view(np.concatenate([numbers] * 9), 2048)[:256]
        # 256 tiles at once: place p holds pattern (p + turn) mod 256 in turn 0 to 255.
        raw = as_bytes(turned.reshape(-1))
        coded = codec.encode(raw)
        assert coded is not None
        back = torch.empty_like(raw)
        assert codec.decode(back, coded)
        assert torch.equal(back, raw)


def test_every_exponent_survives_as_an_exception_in_every_position(variant):
    usual = like_kv(reference.TILE_NUMBERS).numpy().view(np.uint16)
    for first in range(0, reference.TILE_NUMBERS, 256):
        tiles = np.tile(usual, (256, 1))
        places = first + np.arange(256)
        for step in range(0, 256, 16):  # 16 tiles with 256 / 16 strange exponents each, in all places and exponents
            for i in range(16):
                tile = tiles[step + i]
                tile[places[i::16]] = ((places[i::16] + 16 * step) % 256) << 7 | 0x8041
        raw = as_bytes(tiles.reshape(-1))
        coded = codec.encode(raw)
        assert coded is not None
        back = torch.empty_like(raw)
        assert codec.decode(back, coded)
        assert torch.equal(back, raw)


@pytest.mark.parametrize("count", [450, 511, 2047, 2048, 2049, 4096 + 1000, 3 * 2048])
def test_a_payload_of_any_length_equals_the_reference(variant, count):
    assert check_round_trip(like_kv(count))


@pytest.mark.parametrize("exceptions, fits", [(0, True), (36, True), (37, False)])
@pytest.mark.parametrize("small", [False, True])
def test_as_many_exceptions_as_there_is_room_for_fit(variant, exceptions, fits, small):
    """Small numbers among great ones; great ones among small ones move the window down."""
    numbers = np.full(2048, 0x3F80, np.uint16)
    numbers[np.arange(exceptions) * 53] = 0x0080 if small else 0x4F80
    assert check_round_trip(as_bytes(np.concatenate([numbers, numbers]))) == fits


def test_zeros_and_slots_past_a_tail_cost_no_exceptions(variant):
    numbers = like_kv(4096).numpy().view(np.uint16).copy()
    numbers[1000:3500] = 0
    numbers[3500:3520] = 0x8000  # -0
    numbers[3520:3530] = 0x0001  # the least denormal
    assert check_round_trip(as_bytes(numbers))


def test_noise_and_what_would_not_be_shorter_are_raw(variant):
    assert codec.encode(torch.randint(0, 256, (8192,), dtype=torch.uint8)) is None
    assert codec.encode(like_kv(64)) is None
    assert codec.coded_bytes(1, 0) is None


def test_the_ratio_of_whole_tiles_is_1_286():
    assert codec.coded_bytes(8, 64 * TILE_BYTES) * 1.286 < 8 * 64 * TILE_BYTES


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.tuples(st.integers(0, 65535), st.integers(1, 700)), min_size=1, max_size=12),
    st.integers(0, 3),
)
def test_any_numbers_equal_the_reference_and_come_back(runs, noise):
    numbers = np.concatenate([np.full(length, number, np.uint16) for number, length in runs])
    numbers[:: 97 - 20 * noise] ^= 0x0100 << noise
    check_round_trip(as_bytes(numbers))


@settings(deadline=None, max_examples=150)
@given(st.binary(min_size=112, max_size=112), st.integers(1, 5000), st.integers(0, 2**32 - 1))
def test_any_coded_bytes_are_decoded_as_the_reference_says_and_are_a_miss(head, count, seed):
    """Memory on both sides is compared too; tests/test_cpu_driver.py does the same under sanitizers."""
    noise = np.random.default_rng(seed)
    size = codec.HEADER_BYTES + _C.coded_plane_bytes(2 * count)
    coded = torch.from_numpy(noise.integers(0, 256, size, np.uint8))
    coded[codec.HEADER_BYTES :][:112] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
    memory = torch.full((2 * count + 128,), 0xA7, dtype=torch.uint8)
    raw = memory[64:-64]
    before = coded.clone()
    assert not codec.decode(raw, coded)
    assert torch.equal(coded, before)
    assert (memory[:64] == 0xA7).all()
    assert (memory[-64:] == 0xA7).all()
    at, expected = codec.HEADER_BYTES, []
    while count:
        here = min(count, reference.TILE_NUMBERS)
        tile_bytes = _C.coded_plane_bytes(2 * here)
        expected.append(reference.decode_tile(coded[at : at + tile_bytes].numpy().tobytes(), here))
        at, count = at + tile_bytes, count - here
    assert np.array_equal(raw.numpy().view(np.uint16), np.concatenate(expected))


@pytest.mark.parametrize("at", [0, 10, 16, 23, 24, 31, 40, 63, 64, 65, 66, 68, 140, 176, 900, 3000])
def test_a_changed_byte_is_a_miss(at):
    raw = like_kv(4096, spread=300.0)
    raw[-2:] = torch.tensor([0x80, 0x00], dtype=torch.uint8)  # an exception
    coded = codec.encode(raw)
    coded[at] ^= 1
    back = torch.empty_like(raw)
    same = at in (66, 68, 140)  # nobody reads these: a zero, and places and exponents that are not taken
    assert codec.decode(back, coded) == same


def pages_of(dtype: torch.dtype, runs: bool = False) -> KVLayout:
    """Two layers of K and V, pages of 4 tokens: 3 of 4 tiles, so that tiles and pages cross."""
    generator = torch.Generator().manual_seed(3)
    shape = (2, 7, 4, 3, 200 if runs else 256)
    layers = [torch.randn(shape, generator=generator).to(dtype) for _ in range(2)]
    kv = [layer[..., :192] for layer in layers] if runs else layers
    return KVLayout.from_tensors(kv, page_tokens=4, page_dim=1, token_dim=2)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("runs", [False, True])
def test_pages_are_coded_and_restored(variant, runs, threads, monkeypatch):
    layout = pages_of(torch.bfloat16, runs)
    chunks, tokens = [torch.tensor([5, 2, 0, 6]), torch.tensor([1, -1]), torch.tensor([3])], [14, 8, 4]
    planes = len(layout.planes)
    raws = ops.gather_pages(layout, chunks, tokens=tokens)
    sizes = [codec.coded_bytes(planes, len(raw) // planes) for raw in raws]
    payloads = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
    sums = torch.empty(3 * len(chunks), dtype=torch.uint64)
    parts = [
        (ids.data_ptr(), True, len(ids), n, payload.data_ptr() + codec.HEADER_BYTES, 0)
        for ids, n, payload in zip(chunks, tokens, payloads, strict=True)
    ]
    _C.gather_coded(layout._compiled, parts, sums.data_ptr(), threads)
    for raw, payload, (raw_sum, tiles_sum, unfit) in zip(raws, payloads, sums.view(-1, 3).tolist(), strict=True):
        assert not unfit
        assert codec.put_header(payload, raw_sum, tiles_sum, len(raw)) == ops.checksum(payload)
        assert payload.numpy().tobytes() == reference.encode_payload(raw, planes)
    wanted = [page.clone() for page in layout.tensors]
    for tensor in layout.tensors:
        tensor.zero_()
    whole = [(*part[:3], 4 * part[2], *part[4:]) for part in parts]
    _C.scatter_coded(layout._compiled, whole, sums.data_ptr(), threads)
    assert sums.view(-1, 3)[:, 0].tolist() == [ops.checksum(raw) % 2**64 for raw in raws]
    for tensor, want in zip(layout.tensors, wanted, strict=True):
        assert torch.equal(tensor[:, [1, 2, 3, 5, 0]], want[:, [1, 2, 3, 5, 0]])
        assert torch.equal(tensor[:, 6, :2], want[:, 6, :2])
        assert not tensor[:, 6, 2:].any()
        assert not tensor[:, 4].any()


def test_the_planes_of_a_layer_are_coded_by_themselves():
    """What a load by layers needs."""
    layout = pages_of(torch.bfloat16)
    pages = torch.tensor([0, 3, 4])
    raw = ops.gather_pages(layout, pages)
    whole = reference.encode_payload(raw, 4)
    of_plane = _C.coded_plane_bytes(len(raw) // 4)
    payload, checksums = torch.zeros(len(whole), dtype=torch.uint8), []
    for plane in range(4):
        one = _C.PagedCache(
            **{name: getattr(layout, name) for name in ("num_pages", "page_stride", "page_bytes", "run_bytes")},
            **{name: getattr(layout, name) for name in ("run_stride", "page_tokens", "token_bytes")},
            planes=layout.planes[plane : plane + 1],
        )
        sums = torch.empty(3, dtype=torch.uint64)
        at = payload.data_ptr() + codec.HEADER_BYTES + plane * of_plane
        _C.gather_coded(one, [(pages.data_ptr(), True, 3, 12, at, plane * len(raw) // 4)], sums.data_ptr(), 1)
        checksums.append(sums.tolist())
    raw_sum, tiles_sum = (sum(of_plane[i] for of_plane in checksums) % 2**64 for i in (0, 1))
    assert codec.put_header(payload, raw_sum, tiles_sum, len(raw)) == ops.checksum(payload)
    assert payload.numpy().tobytes() == whole


def test_bad_ids_are_refused():
    layout = pages_of(torch.bfloat16)
    pages, sums = torch.tensor([7]), torch.empty(3, dtype=torch.uint64)
    payload = torch.zeros(100_000, dtype=torch.uint8)
    for copy in (_C.gather_coded, _C.scatter_coded):
        with pytest.raises(ValueError, match=r"expected an id in \[0, 7\)"):
            copy(layout._compiled, [(pages.data_ptr(), True, 1, 4, payload.data_ptr(), 0)], sums.data_ptr(), 1)


# --- Caches

PAGE_TOKENS, CHUNK_TOKENS, TOKENS = 4, 8, 30  # three chunks and a tail


def caches_of(dtype: torch.dtype = torch.bfloat16, noise: int | None = None, seed: int = 7) -> list[torch.Tensor]:
    """Two layers of K and V; the page of chunk `noise` is no normal distribution."""
    generator = torch.Generator().manual_seed(seed)
    layers = [torch.randn(2, 10, PAGE_TOKENS, 2, 400, generator=generator).to(dtype) for _ in range(2)]
    if noise is not None:
        layers[1][1, 2 * noise].view(torch.int16).random_(generator=generator)
    return layers


def cache_over(layers: list[torch.Tensor], store: object, codec: str | None = "split") -> lmc.KVCache:
    layout = KVLayout.from_tensors(
        {f"layer.{i}": t for i, t in enumerate(layers)}, page_tokens=PAGE_TOKENS, page_dim=1, token_dim=2
    )
    return lmc.KVCache(layout, store, lmc.Namespace(model="m"), CHUNK_TOKENS, codec=codec)


PROMPT = lmc.Prompt(list(range(TOKENS)))
PAGES = list(range(8))


@pytest.fixture(params=["mem", "shm", "file", "shm,file"])
def store(request, tmp_path):
    opened, remove = new_store(request.param, tmp_path, capacity="8MiB")
    yield opened
    opened.close()
    remove()


@pytest.fixture
def mem(tmp_path):
    opened, _ = new_store("mem", tmp_path, capacity="8MiB")
    yield opened
    opened.close()


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("noise", [None, 0, 1, 2])
def test_a_cache_restores_what_it_stored_coded_or_raw(store, noise, by_layer):
    layers = caches_of(noise=noise)
    wanted = [layer.clone() for layer in layers]
    with cache_over(layers, store) as cache:
        assert cache.codec == "split"
        job = cache.store(PROMPT, PAGES, by_layer=by_layer)
        if by_layer:
            job.layer_written("layer.0")
            job.layer_written("layer.1")
        assert job.result() == TOKENS
        stats = cache.stats()
        raw = len(wanted) * 2 * 8 * PAGE_TOKENS * 1600
        assert stats["raw_bytes"] == raw
        chunk = codec.coded_bytes(4, 2 * PAGE_TOKENS * 1600)
        coded = 4 - (noise is not None)
        assert stats["stored_bytes"] == coded * chunk + (4 - coded) * raw // 4
        assert stats["codec_ratio"] == raw / stats["stored_bytes"]
        for layer in layers:
            layer.zero_()
        assert cache.match(PROMPT) == TOKENS
        job = cache.retrieve(PROMPT, PAGES, by_layer=by_layer)
        if by_layer:
            assert job.layer_ready("layer.0")
        assert job.result() == TOKENS
    for layer, want in zip(layers, wanted, strict=True):
        want[:, 7, 2:] = 0  # past the tail
        assert torch.equal(layer[:, :8].view(torch.int16), want[:, :8].view(torch.int16))


@pytest.mark.parametrize("store", ["shm"], indirect=True)
def test_what_does_not_fit_is_dropped_where_there_is_no_room_for_it_raw(store, monkeypatch):
    layers = caches_of(noise=1)
    with cache_over(layers, store) as cache:
        reserve = store.reserve
        monkeypatch.setattr(store, "reserve", lambda k, s, *a: reserve(k, s, *a) if len(k) > 1 else [None])
        assert cache.store(PROMPT, PAGES).result() == TOKENS - CHUNK_TOKENS
        assert cache.match(PROMPT) == CHUNK_TOKENS
        assert cache.retrieve(PROMPT, PAGES).result() == CHUNK_TOKENS


def test_caches_with_and_without_a_codec_never_meet(mem):
    layers = caches_of()
    coded, raw = cache_over(layers, mem), cache_over(layers, mem, None)
    assert coded.store(PROMPT, PAGES).result() == TOKENS
    assert raw.match(PROMPT) == 0
    assert raw.store(PROMPT, PAGES).result() == TOKENS
    assert coded.match(PROMPT) == raw.match(PROMPT) == TOKENS


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_stay_raw_and_keep_their_keys(mem, dtype):
    layers = caches_of(dtype)
    cache = cache_over(layers, mem)
    assert cache.codec is None
    assert cache.store(PROMPT, PAGES).result() == TOKENS
    assert cache.stats()["codec_ratio"] == 1
    assert cache_over(layers, mem, None).match(PROMPT) == TOKENS


@pytest.mark.parametrize("damage", ["tile", "header", "zeros"])
def test_a_record_that_is_not_what_was_coded_is_a_miss_and_is_removed(store, damage):
    """Not found by the store's own checksum: what it was given was wrong."""
    layers = caches_of()
    with cache_over(layers, store) as cache:
        assert cache.store(PROMPT, PAGES).result() == TOKENS
        key = cache._records(PROMPT)[1].key
        payload = np.empty(codec.coded_bytes(4, 2 * PAGE_TOKENS * 1600), np.uint8)
        cache.backend.flush()
        assert cache.backend.get_into([key], [payload])[0]
        cache.backend.delete([key])
        if damage == "zeros":
            payload[:] = 0
        else:
            payload[64 + 1000 if damage == "tile" else 20] ^= 4
        cache.backend.put([key], [payload])
        assert cache.match(PROMPT) == TOKENS
        assert cache.retrieve(PROMPT, PAGES).result() == CHUNK_TOKENS
        if not isinstance(store, TieredSlotStore):  # a slower tier may have, and keep, a record that is right
            assert cache.match(PROMPT) == CHUNK_TOKENS


def test_a_codec_that_is_not_there_is_refused():
    layers = caches_of()
    with pytest.raises(ValueError, match="codec: expected 'split' or None, got 'zip'"):
        cache_over(layers, "mem://?capacity=8MiB", "zip")
    with pytest.raises(ValueError, match="codec: expected 'split' or None, got 'zip'"):
        lmc.EncoderCache("mem://?capacity=8MiB", lmc.Namespace(model="m"), codec="zip")


# --- Encoder outputs


def test_encoder_outputs_are_coded_where_they_are_bf16(store):
    output = torch.randn(3, 700, generator=torch.Generator().manual_seed(1)).bfloat16()
    namespace = lmc.Namespace(model="m")
    noise = torch.randint(-(2**15), 2**15, (4096,), dtype=torch.int16).view(torch.bfloat16)
    mixed = [output, torch.arange(5)]
    with lmc.EncoderCache(store, namespace, codec="split") as cache:
        outputs = {"one": output, "two": [output, output[:1]], "mixed": mixed, "noise": noise, "none": output[:0]}
        for name, given in outputs.items():
            assert cache.save(name, given)
            assert not cache.save(name, given)
            assert cache.contains(name)
            loaded = cache.load(name)
            pairs = zip(loaded, given, strict=True) if isinstance(given, list) else [(loaded, given)]
            for a, b in pairs:
                assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        raw = lmc.EncoderCache(cache.backend, namespace)
        assert [name for name in outputs if raw.contains(name)] == ["mixed"]
        assert raw.save("one", output)
        assert torch.equal(raw.load("one"), cache.load("one"))


def test_a_coded_encoder_output_that_is_wrong_is_a_miss_and_may_be_saved_again():
    output = torch.randn(3, 700, generator=torch.Generator().manual_seed(1)).bfloat16()
    with lmc.EncoderCache("mem://?capacity=8MiB", lmc.Namespace(model="m"), codec="split") as cache:
        assert cache.save("one", output)
        key = encoder_cache.payload_key(cache._key("one", "image", None, None), encoder_cache.describe(output), "split")
        cache.backend.delete([key])
        cache.backend.put([key], [np.zeros(codec.coded_bytes(1, 4200), np.uint8)])
        assert cache.load("one") is None
        assert cache.save("one", output)
        assert torch.equal(cache.load("one"), output)
