"""EncoderCache over every store, and its keys and records against reference.py and the golden vectors."""

import contextlib
import json
import subprocess
import sys
import uuid
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lmcache_mm as lmc
from lmcache_mm import encoder_cache, ops, reference
from lmcache_mm.commands.cli import main as lmcache_mm
from lmcache_mm.stores import open_store
from test_stores import new_store

VECTORS = json.loads(Path(__file__).with_name("vectors.json").read_text())["encoder"]
NAMESPACE = lmc.Namespace(model="m", weights="w", dtype=torch.bfloat16)
OUTPUT = torch.randn(23, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))


@pytest.fixture(params=["mem", "shm", "file", "mem,file", "shm,file"])
def cache(request, tmp_path):
    store, remove = new_store(request.param, tmp_path)
    yield lmc.EncoderCache(store, NAMESPACE)
    remove()


@pytest.fixture
def mem():
    with lmc.EncoderCache("mem://?capacity=1MiB", NAMESPACE) as cache:
        yield cache


def same(a, b):
    """Whether both are equal bit by bit, and in kind, dtypes and shapes."""
    if isinstance(a, torch.Tensor) != isinstance(b, torch.Tensor):
        return False
    pairs = [(a, b)] if isinstance(a, torch.Tensor) else list(zip(a, b, strict=True))
    return all(x.dtype == y.dtype and x.shape == y.shape and bits(x) == bits(y) for x, y in pairs)


def bits(tensor):
    return tensor.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def keys_of(identifier, output, modality="image", **request):
    """The keys of the description and of the payload, by the reference."""
    tensors = [output] if isinstance(output, torch.Tensor) else output
    key = reference.encoder_key(NAMESPACE.root(**request), lmc.Item(identifier, 0, 0, modality))
    description = reference.encoder_description(tensors, not isinstance(output, torch.Tensor))
    return [key, reference.encoder_payload_key(key, description)]


def damage(store, key, size):
    """Makes the payload differ from its checksum, as on a failing disk."""
    payload = bytearray(size)
    assert store.get_into([key], [payload]) == [True]
    right = ops.checksum(np.frombuffer(payload, np.uint8))
    store.delete([key])
    payload[size // 2] ^= 0x10
    store.put([key], [payload], checksums=[right])
    store.flush()


# --- What is kept


def test_an_output_is_loaded_as_it_was_saved(cache):
    assert not cache.contains("a")
    assert cache.load("a") is None
    assert cache.save("a", OUTPUT)
    cache.backend.flush()
    assert cache.contains("a")
    assert same(cache.load("a"), OUTPUT)
    assert not cache.save("a", OUTPUT)


def test_what_was_asked_is_counted(cache):
    assert cache.stats() == {"queried_items": 0, "hit_items": 0, "hit_rate": 0, "stored_items": 0}
    assert cache.load("one") is None
    assert cache.save("one", OUTPUT)
    assert not cache.save("one", OUTPUT)  # it exists
    assert cache.contains("one")
    assert cache.load("one") is not None
    assert cache.load_into("one", torch.empty_like(OUTPUT))
    assert not cache.load_into("two", torch.empty_like(OUTPUT))
    assert cache.stats() == {"queried_items": 4, "hit_items": 2, "hit_rate": 0.5, "stored_items": 1}


def test_a_list_of_outputs_is_loaded_as_it_was_saved(cache):
    outputs = [OUTPUT, torch.arange(5), torch.tensor(True), torch.zeros(0, 7, dtype=torch.float16)]
    cache.save("a", outputs)
    assert same(cache.load("a"), outputs)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_tensors_of_any_strides_and_devices_are_saved_and_filled(cache, device):
    output = OUTPUT.to(device).T
    cache.save("a", output)
    into = torch.zeros(40, 23, 2, dtype=torch.bfloat16, device=device)[..., 0]
    assert cache.load_into("a", into)
    assert same(into, output)
    loaded = cache.load("a", device=device)
    assert loaded.device.type == device
    assert same(loaded, output)


def test_what_the_store_has_no_room_for_is_not_said_to_be_saved():
    with lmc.EncoderCache("mem://?capacity=64KiB", NAMESPACE) as cache:
        assert not cache.save("a", torch.zeros(1 << 17, dtype=torch.uint8))
        assert cache.load("a") is None
        assert cache.save("b", torch.zeros(1 << 10, dtype=torch.uint8))


def test_tensors_that_need_gradients_are_saved_and_filled(mem):
    output = OUTPUT.clone().requires_grad_()
    mem.save("a", output)
    into = torch.zeros_like(OUTPUT).requires_grad_()
    assert mem.load_into("a", into)
    assert same(into.detach(), OUTPUT)


@pytest.mark.parametrize(
    "other", [OUTPUT[1:], OUTPUT.T, OUTPUT.float(), OUTPUT.half(), [OUTPUT], [OUTPUT, OUTPUT], []], ids=str
)
def test_tensors_of_another_form_are_left_alone(cache, other):
    cache.save("a", OUTPUT)
    before = [tensor.clone() for tensor in encoder_cache.as_tensors(other)]
    assert not cache.load_into("a", other)
    assert same(encoder_cache.as_tensors(other), before)
    assert cache.load_into("a", torch.zeros_like(OUTPUT))


DTYPES = [
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.int8, torch.uint8),
    *(torch.int64, torch.uint16, torch.bool, torch.complex64),
]


@st.composite
def tensors(draw):
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 9) | st.sampled_from([63, 64, 65]), max_size=3))
    tensor = torch.empty(shape, dtype=dtype)
    below = 2 if dtype == torch.bool else 256
    data = np.random.default_rng(draw(st.integers(0, 99))).integers(0, below, tensor.nbytes, dtype=np.uint8)
    tensor.reshape(-1).view(torch.uint8)[:] = torch.from_numpy(data)
    return tensor


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
outputs = tensors() | st.lists(tensors(), max_size=4)


@settings(max_examples=200, deadline=None)
@given(
    texts.filter(bool), texts, outputs, st.sampled_from([{}, {"salt": "s"}, {"salt": "s", "lora": "l"}, {"lora": "s"}])
)
def test_keys_and_records_equal_the_reference(identifier, modality, output, request):
    with lmc.EncoderCache("mem://?capacity=16MiB", NAMESPACE) as cache:
        cache.save(identifier, output, modality, **request)
        assert same(cache.load(identifier, modality, **request), output)
        tensors = encoder_cache.as_tensors(output)
        description = reference.encoder_description(tensors, not isinstance(output, torch.Tensor))
        payload = reference.encoder_payload(tensors)
        expected = dict(zip(keys_of(identifier, output, modality, **request), [description, payload], strict=True))
        for key, value in expected.items():
            got = bytearray(len(value))
            assert cache.backend.get_into([key], [got]) == [True]
            assert got == value
        assert cache.backend.stats()["records"] == 2


@pytest.mark.parametrize("case", VECTORS, ids=lambda case: case["item"][0][:8])
def test_keys_are_the_golden_ones(case):
    key = encoder_cache.output_key(bytes.fromhex(case["root"]), case["item"][0], case["item"][3])
    description = encoder_cache.describe(
        [torch.zeros(shape, dtype=getattr(torch, dtype)) for dtype, shape in case["tensors"]]
    )
    assert key.hex() == case["key"]
    assert description == bytes.fromhex(case["description"]).ljust(encoder_cache.DESCRIPTION_BYTES, b"\0")
    assert encoder_cache.payload_key(key, description).hex() == case["payload_key"]


# --- What shares nothing


def test_other_items_tenants_adapters_and_models_are_misses(cache):
    cache.save("a", OUTPUT, "image", salt="s", lora="l")
    cache.backend.flush()
    others = [
        *(dict(identifier="b"), dict(modality="video"), dict(salt="t"), dict(lora="k")),
        *(dict(salt=None), dict(lora=None), dict(salt="l", lora="s"), dict(identifier="image", modality="a")),
    ]
    for other in others:
        asked = {"identifier": "a", "modality": "image", "salt": "s", "lora": "l", **other}
        assert not cache.contains(**asked)
        assert cache.load(**asked) is None
        assert not cache.load_into(output=torch.zeros_like(OUTPUT), **asked)
    for namespace in (dict(model="m"), dict(model="m", weights="w", dtype=torch.bfloat16, encoder="fp8")):
        other_model = lmc.EncoderCache(cache.backend, lmc.Namespace(**namespace))
        assert other_model.load("a", salt="s", lora="l") is None
    assert same(cache.load("a", salt="s", lora="l"), OUTPUT)


def test_an_adapter_is_named_as_in_a_prompt(cache):
    cache.save("a", OUTPUT, lora=b"l")
    assert same(cache.load("a", lora="l"), OUTPUT)
    of_prompt = get_type_hints(lmc.Prompt)["lora"]
    for method in (cache.contains, cache.load, cache.load_into, cache.save):
        assert get_type_hints(method)["lora"] == of_prompt


def test_keys_of_outputs_are_none_of_kv_even_under_one_root():
    """Keys of KV are 36 bytes long; the 32 bytes of a prefix come from another mode of BLAKE3."""
    root = NAMESPACE.root()
    item = lmc.Item("a", 0, 1)
    prefixes = ops.prefix_keys([9], [item], root, [0, 1])
    assert all(len(key) == 32 for key in keys_of("a", OUTPUT))
    assert {bytes(key.tolist()) for key in prefixes}.isdisjoint(keys_of("a", OUTPUT))


def test_a_tenant_is_forgotten(cache):
    cache.save("a", OUTPUT, salt="s")
    cache.save("a", OUTPUT, salt="t")
    assert cache.forget("s") == 2
    assert cache.load("a", salt="s") is None
    assert same(cache.load("a", salt="t"), OUTPUT)
    with pytest.raises(ValueError, match="salt: expected a nonempty str"):
        cache.forget("")


def test_what_is_forgotten_while_it_is_saved_does_not_come_back(cache, monkeypatch):
    def pack_slowly(output):
        cache.forget("s")
        return pack(output)

    pack = encoder_cache.pack
    monkeypatch.setattr(encoder_cache, "pack", pack_slowly)
    for salt in ("s", "t"):
        cache.save("a", OUTPUT, salt=salt)
    cache.backend.flush()
    assert cache.load("a", salt="s") is None
    assert same(cache.load("a", salt="t"), OUTPUT)


# --- What is lost or damaged


@pytest.mark.parametrize("record", [0, 1], ids=["description", "payload"])
def test_a_damaged_record_is_a_miss_and_may_be_saved_again(cache, record):
    cache.save("a", OUTPUT)
    cache.backend.flush()
    size = [encoder_cache.DESCRIPTION_BYTES, OUTPUT.nbytes][record]
    damage(cache.backend, keys_of("a", OUTPUT)[record], size)
    assert cache.load("a") is None
    assert cache.save("a", OUTPUT)
    assert same(cache.load("a"), OUTPUT)


@pytest.mark.parametrize("record", [0, 1], ids=["description", "payload"])
def test_an_output_of_which_a_record_is_gone_is_a_miss_and_may_be_saved_again(cache, record):
    cache.save("a", OUTPUT)
    cache.backend.flush()
    cache.backend.delete([keys_of("a", OUTPUT)[record]])
    assert not cache.contains("a")
    assert cache.load("a") is None
    assert cache.save("a", OUTPUT)
    assert same(cache.load("a"), OUTPUT)


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=60) | st.binary(min_size=1, max_size=8).map(lambda b: b"\0\1\0\0\0\7\0\0\0float32\2\0\0\0" + b)
)
def test_a_description_that_nobody_wrote_is_a_miss(start):
    described_by_nobody(start, None)


def described_by_nobody(start, size):
    """Stores an item with these bytes as its description, and if given a size, with a payload of that size."""
    description = start.ljust(encoder_cache.DESCRIPTION_BYTES, b"\0")
    with lmc.EncoderCache("mem://?capacity=256KiB", NAMESPACE) as cache:
        cache.backend.put(keys_of("a", OUTPUT)[:1], [description])
        if size is None:
            assert not cache.contains("a")
            assert cache.load("a") is None
            return
        key = encoder_cache.payload_key(keys_of("a", OUTPUT)[0], description)
        cache.backend.put([key], [bytes(size)])
        loaded = cache.load("a")
    # A valid description of an output with this payload round-trips.
    assert loaded is None or encoder_cache.describe(loaded) == description


NAMES = st.sampled_from([*encoder_cache.DTYPES, "half", "_C", "nn", "onnx", "__dict__", "Tensor", ""]) | st.text(
    max_size=9
)
SIZES = st.integers(0, 5) | st.sampled_from([1 << 20, 1 << 40, (1 << 64) - 1])


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 2),
    st.integers(0, 3) | st.just((1 << 32) - 1),
    st.lists(st.tuples(NAMES, st.lists(SIZES, max_size=4) | st.just([1] * 80)), max_size=3),
    st.integers(0, 300),
)
def test_a_description_and_a_payload_that_nobody_wrote_are_a_miss_or_what_they_say(is_list, count, tensors, size):
    parts = [bytes([is_list]), count.to_bytes(4, "little")]
    for name, shape in tensors:
        parts += [len(name.encode()).to_bytes(4, "little"), name.encode(), len(shape).to_bytes(4, "little")]
        parts += [extent.to_bytes(8, "little") for extent in shape]
    described_by_nobody(b"".join(parts), size)


@pytest.mark.parametrize("name", encoder_cache.DTYPES)
def test_every_dtype_of_torch_that_a_description_can_name_is_loaded_or_a_miss(name):
    size = 16 * encoder_cache.DTYPES[name].itemsize
    part = len(name).to_bytes(4, "little") + name.encode() + b"\1\0\0\0" + (16).to_bytes(8, "little")
    described_by_nobody(b"\0\1\0\0\0" + part, size)


def test_a_store_that_is_full_drops_what_does_not_fit(mem):
    large = torch.zeros(2 << 20, dtype=torch.uint8)
    mem.save("large", large)
    assert mem.load("large") is None
    assert not mem.contains("large")
    for i in range(100):
        mem.save(str(i), OUTPUT.repeat(10, 1))
    assert same(mem.load("99"), OUTPUT.repeat(10, 1))
    assert mem.load("0") is None


def test_another_process_finds_what_was_saved(tmp_path):
    url = f"shm:///test-{uuid.uuid4().hex}"
    try:
        with lmc.EncoderCache(f"{url}?capacity=1MiB", NAMESPACE) as cache:
            cache.save("a", OUTPUT, salt="s")
        code = f"""
import torch, lmcache_mm as lmc
namespace = lmc.Namespace(model="m", weights="w", dtype=torch.bfloat16)
with lmc.EncoderCache({url!r}, namespace) as cache:
    print(cache.load("a", salt="s").float().sum().item())
"""
        done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120)
        assert float(done.stdout) == OUTPUT.float().sum().item()
    finally:
        assert lmcache_mm(["clear", url]) == 0


# --- Misuse


def test_what_cannot_be_kept_is_refused_and_named(mem):
    for output, error, text in [
        ([OUTPUT, 3], TypeError, r"output\[1\]: expected a torch.Tensor, got int"),
        (None, TypeError, "output: expected a torch.Tensor or a list of them, got NoneType"),
        (OUTPUT.float().numpy(), TypeError, "output: expected a torch.Tensor or a list of them, got ndarray"),
        (OUTPUT.to_sparse(), TypeError, "output: expected a dense tensor, got torch.sparse_coo"),
        (torch.zeros(3, device="meta"), ValueError, "output: expected a tensor on cpu or cuda, got one on meta"),
        ([OUTPUT] * 500, ValueError, "output: expected tensors that 4096 bytes can describe, got 500"),
    ]:
        for call in (mem.save, mem.load_into):
            with pytest.raises(error, match=text):
                call("a", output)
    with pytest.raises(TypeError, match="identifier: expected str, got bytes"):
        mem.save(b"a", OUTPUT)
    with pytest.raises(ValueError, match="identifier: expected a string that UTF-8 can hold"):
        mem.load("\ud800")
    with pytest.raises(TypeError, match=r"namespace: expected lmcache_mm\.Namespace, got str"):
        lmc.EncoderCache(mem.backend, "m")
    with pytest.raises(TypeError, match="store: expected a URL, a list of URLs or an open store, got NoneType"):
        lmc.EncoderCache(None, NAMESPACE)
    assert mem.backend.stats()["records"] == 0


def test_after_close_there_is_one_clear_error():
    cache = lmc.EncoderCache("mem://?capacity=1MiB", NAMESPACE)
    cache.close()
    for call in (
        *(lambda: cache.load("a"), lambda: cache.load_into("a", OUTPUT), lambda: cache.save("a", OUTPUT)),
        *(lambda: cache.contains("a"), lambda: cache.forget("a"), cache.stats),
    ):
        with pytest.raises(RuntimeError, match="cache: it is closed"):
            call()


def test_a_store_of_the_callers_stays_open():
    with contextlib.closing(open_store("mem://?capacity=1MiB")) as store:
        with lmc.EncoderCache(store, NAMESPACE) as cache:
            cache.save("a", OUTPUT)
        assert store.stats()["records"] == 2
        with pytest.raises(RuntimeError, match="cache: it is closed"):
            cache.load("a")
