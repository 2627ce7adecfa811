"""Content ids, prefix keys, namespaces and fingerprints, against reference.py and the golden vectors."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

import lmcache_mm as lmc
from lmcache_mm import reference
from lmcache_mm.prompt import NAMESPACE_CONTEXT, encode_fields, owner_of

VECTORS = json.loads(Path(__file__).with_name("vectors.json").read_text())
ROOT = bytes(range(32))
EDGES = [0, 1, 7, 8, 9, 127, 128, 129, 255, 256, 257, 384, 512, 1023, 1024, 1025]


def to_items(fields):
    return [lmc.Item(*f) for f in fields]


def overwrite(ids, items):
    tensor = torch.tensor(ids, dtype=torch.int64)
    lmc.ops.apply_mm_hashes_to_token_ids(
        tensor, [i.identifier for i in items], [(i.offset, i.length) for i in items], [i.modality for i in items]
    )
    return tensor


# --- golden vectors


def test_the_blake3_package_gives_the_vectors_that_blake3_publishes():
    published = VECTORS["blake3"]
    for case in published["cases"]:
        data = bytes(i % 251 for i in range(case["bytes"]))
        assert blake3(data, key=published["key"].encode()).hexdigest() == case["keyed_hash"]
        assert blake3(data, derive_key_context=published["context"]).hexdigest() == case["derive_key"]


@pytest.mark.parametrize("case", VECTORS["items"], ids=lambda c: f"{c['item'][0][:8]}@{c['lanes_from']}")
def test_lanes_and_digests_of_items_are_the_golden_ones(case):
    item = lmc.Item(*case["item"])
    assert [f"{lane:016x}" for lane in reference.lanes(item, case["lanes_from"], 9)] == case["lanes"]
    assert reference.item_digest(item).hex() == case["digest"]


def test_content_ids_of_the_golden_prompt_are_the_golden_ones():
    prompt = VECTORS["prompt"]
    got = overwrite(prompt["token_ids"], to_items(prompt["items"]))
    assert [f"{int(i) % 2**64:016x}" for i in got] == prompt["content_ids"]


def test_items_chains_of_the_golden_prompt_are_the_golden_ones():
    items = to_items(VECTORS["prompt"]["items"])
    assert [[end, reference.items_chain(items, end).hex()] for end, _ in VECTORS["prompt"]["chains"]] == VECTORS[
        "prompt"
    ]["chains"]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_prefix_keys_of_the_golden_prompt_are_the_golden_ones(dtype):
    prompt = VECTORS["prompt"]
    ids = torch.tensor(prompt["token_ids"], dtype=dtype)
    cuts = [end for end, _ in prompt["keys"]]
    keys = lmc.ops.prefix_keys(ids, to_items(prompt["items"]), bytes.fromhex(prompt["root"]), cuts)
    assert [bytes(key.tolist()).hex() for key in keys] == [key for _, key in prompt["keys"]]


@pytest.mark.parametrize("case", VECTORS["namespaces"], ids=lambda c: c["root"][:8])
def test_namespace_roots_are_the_golden_ones(case):
    namespace = lmc.Namespace(**case["fields"])
    if "" in case["request"].values():  # a root that the format has but no request can
        with pytest.raises(ValueError, match="expected a nonempty str or bytes; pass None for no "):
            namespace.root(**case["request"])
        fields = {**namespace._fields, **{name: value.encode() for name, value in case["request"].items()}}
        root = blake3(encode_fields(fields), derive_key_context=NAMESPACE_CONTEXT).digest()
    else:
        root = namespace.root(**case["request"])
    assert root.hex() == case["root"]


@pytest.mark.parametrize("case", VECTORS["layouts"], ids=lambda c: c["fingerprint"][:8])
def test_layout_fingerprints_are_the_golden_ones(case):
    layout = lmc.KVLayout(**case["layout"])
    assert layout.fingerprint(case["chunk_tokens"], case["mode"]).hex() == case["fingerprint"]


# --- properties

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40) | st.integers(0, 3000).map(lambda n: "x" * n)
lengths = st.sampled_from(EDGES) | st.integers(0, 1500)


@st.composite
def prompts(draw):
    n = draw(lengths)
    seed = draw(st.integers(0, 2**32 - 1))
    ids = np.random.default_rng(seed).integers(0, 2**32, n)
    ids[: n // 3] %= 7
    positions = st.integers(0, n + 5) | st.sampled_from(EDGES)
    item = st.builds(lmc.Item, texts, positions, positions, st.sampled_from(["image", "video", "audio", ""]))
    items = draw(st.lists(item, max_size=5))
    cuts = sorted(draw(st.sets(st.integers(0, n) | st.sampled_from([e for e in EDGES if e <= n]), max_size=12)))
    return ids.tolist(), items, cuts


@settings(max_examples=150, deadline=None)
@given(prompts())
def test_keys_and_content_ids_equal_the_reference(prompt):
    ids, items, cuts = prompt
    assert torch.equal(lmc.ops.prefix_keys(ids, items, ROOT, cuts), reference.prefix_keys(ids, items, ROOT, cuts))
    want = reference.apply_mm_hashes_to_token_ids(torch.tensor(ids, dtype=torch.int64), items)
    assert torch.equal(overwrite(ids, items), want)


@settings(max_examples=150, deadline=None)
@given(prompts(), st.data())
def test_a_growing_prompt_has_the_keys_of_starting_over(prompt, data):
    ids, items, cuts = prompt
    ends = sorted(data.draw(st.lists(st.one_of(st.integers(0, len(ids)), st.sampled_from(EDGES)), max_size=6)))
    ends = [end for end in ends if end <= len(ids)] + [len(ids)]
    expected = reference.prefix_keys(ids, items, ROOT, cuts)
    for simd in lmc._C.simd_variants():
        lmc._C.use_simd(simd)
        running = lmc.ops.RunningKeys(items, ROOT)
        keys = []
        for end in ends:
            now = [cut for cut in cuts[len(keys) :] if cut <= end]
            got = running.extend(ids[running.tokens : end], now)
            assert running.tokens == end
            keys += zip(now, got, strict=True)
        assert [cut for cut, _ in keys] == list(cuts)
        for (_, key), want in zip(keys, expected, strict=True):
            assert torch.equal(key, want)
    lmc._C.use_simd(lmc._C.simd_variants()[0])


def test_a_growing_prompt_refuses_what_it_cannot_take_and_goes_on():
    running = lmc.ops.RunningKeys([lmc.Item("a", 3, 700)], ROOT)
    running.extend(range(600), [5, 600])
    for ids, cuts, text in [
        ([1, -1], [602], r"token_ids\[1\]: expected a token id"),
        ([1], [599], "cuts: expected at least the 600 tokens that there were, got 599"),
        ([1], [602], "cuts: expected at most the prompt's 601 tokens"),
        ([1], [601, 601], "cuts: expected strictly ascending"),
    ]:
        with pytest.raises(ValueError, match=text):
            running.extend(ids, cuts)
    assert running.tokens == 600
    keys = running.extend(range(600, 900), [600, 900])
    assert torch.equal(keys, reference.prefix_keys(list(range(900)), [lmc.Item("a", 3, 700)], ROOT, [600, 900]))
    with pytest.raises(ValueError, match="root: expected 32 bytes"):
        lmc.ops.RunningKeys([], b"")
    with pytest.raises(TypeError, match=r"items\[0\]: expected lmcache_mm.Item"):
        lmc.ops.RunningKeys(["a"], ROOT)


def test_a_million_tokens_one_chunk_at_a_time_have_the_keys_of_starting_over():
    ids = torch.randint(0, 1 << 32, (1 << 20,), generator=torch.Generator().manual_seed(3))
    items = [lmc.Item("a", 1000, 500_000), lmc.Item("b", 700_000, 9)]
    running = lmc.ops.RunningKeys(items, ROOT)
    ends = range(256, len(ids) + 1, 256)
    keys = torch.cat([running.extend(ids[end - 256 : end], [end]) for end in ends])
    assert torch.equal(keys, lmc.ops.prefix_keys(ids, items, ROOT, ends))


@settings(max_examples=60, deadline=None)
@given(prompts(), st.randoms())
def test_keys_depend_on_nothing_behind_the_cut_and_not_on_the_order_of_items(prompt, random):
    ids, items, cuts = prompt
    keys = lmc.ops.prefix_keys(ids, items, ROOT, cuts)
    shuffled = random.sample(items, len(items))
    assert torch.equal(lmc.ops.prefix_keys(ids, shuffled, ROOT, cuts), keys)
    for end, key in zip(cuts, keys, strict=True):
        begun = [item for item in items if item.offset < end]
        assert torch.equal(lmc.ops.prefix_keys(ids[:end], begun, ROOT, [end])[0], key)


@settings(max_examples=60, deadline=None)
@given(prompts(), st.integers(0, 1500))
def test_the_overwrite_of_a_prefix_is_the_prefix_of_the_overwrite(prompt, end):
    ids, items, _ = prompt
    assert torch.equal(overwrite(ids[:end], items), overwrite(ids, items)[:end])


def test_every_change_of_an_item_that_begins_before_a_cut_changes_its_key():
    ids = [7] * 300
    item = lmc.Item("a", 100, 50)
    base = lmc.ops.prefix_keys(ids, [item], ROOT, [100, 101, 300])
    others = [
        lmc.Item("b", 100, 50),
        lmc.Item("a", 100, 50, "video"),
        lmc.Item("a", 100, 51),
        lmc.Item("a", 99, 50),
        lmc.Item("a", 100, 0),
    ]
    for other in others:
        keys = lmc.ops.prefix_keys(ids, [other], ROOT, [100, 101, 300])
        assert torch.equal(keys[0], base[0]) == (other.offset >= 100)
        assert not torch.equal(keys[1], base[1])
        assert not torch.equal(keys[2], base[2])
    twice = lmc.ops.prefix_keys(ids, [item, item], ROOT, [101])
    assert not torch.equal(twice[0], base[1])


def test_field_boundaries_of_modality_and_identifier_count():
    ids = [7] * 10
    keys = {
        bytes(lmc.ops.prefix_keys(ids, [lmc.Item(i, 0, 5, m)], ROOT, [10])[0].tolist())
        for m, i in (("ab", "c"), ("a", "bc"), ("abc", ""), ("", "abc"))
    }
    assert len(keys) == 4


def test_identical_items_at_two_places_have_identical_lanes_but_different_keys():
    ids = [9] * 64
    got = overwrite(ids, [lmc.Item("a", 3, 10), lmc.Item("a", 40, 10)])
    assert torch.equal(got[3:13], got[40:50])
    assert (got[3:13] < 0).all()
    assert (got[13:40] == 9).all()


def test_positions_may_be_objects_and_the_modality_is_image_where_none_is_given():
    ids = torch.arange(20)
    lmc.ops.apply_mm_hashes_to_token_ids(ids, ["h"], [SimpleNamespace(offset=4, length=6)])
    assert torch.equal(ids, overwrite(list(range(20)), [lmc.Item("h", 4, 6, "image")]))


def test_numpy_and_torch_ids_share_memory_with_the_result():
    array = np.arange(20)
    assert lmc.ops.apply_mm_hashes_to_token_ids(array, ["h"], [(4, 6)]) is array
    assert (array[4:10] < 0).all()


def test_keys_of_an_empty_prompt_no_items_and_no_cuts_are_valid():
    assert lmc.ops.prefix_keys([], [], ROOT, []).shape == (0, 32)
    assert torch.equal(lmc.ops.prefix_keys([], [], ROOT, [0]), reference.prefix_keys([], [], ROOT, [0]))
    assert lmc.ops.apply_mm_hashes_to_token_ids(torch.empty(0, dtype=torch.int64), [], []).shape == (0,)


def test_strided_ids_are_read_as_what_they_are():
    ids = torch.arange(600)[::2]
    assert torch.equal(lmc.ops.prefix_keys(ids, [], ROOT, [300]), reference.prefix_keys(ids.tolist(), [], ROOT, [300]))


def test_a_new_process_with_another_hash_seed_makes_the_same_keys():
    code = (
        "import lmcache_mm as lmc; print(bytes(lmc.ops.prefix_keys([1] * 300, [lmc.Item('a', 5, 90)], "
        "lmc.Namespace(model='m').root(salt='s'), [300])[0].tolist()).hex())"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, check=True, capture_output=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(runs) == 1


# --- prompts and cuts


def test_cuts_are_every_chunk_the_end_of_the_items_and_the_end_of_the_prompt():
    prompt = lmc.Prompt(list(range(1000)), [lmc.Item("a", 10, 500), lmc.Item("b", 100, 200)])
    assert prompt.cuts(256) == [256, 510, 512, 768, 1000]
    assert prompt.cuts(256, whole=16) == [256, 496, 512, 768, 992]
    assert lmc.Prompt([1] * 512).cuts(256) == [256, 512]
    assert lmc.Prompt([1] * 9, [lmc.Item("a", 2, 5000)]).cuts(256) == [9]
    assert lmc.Prompt([1] * 9).cuts(256, whole=16) == []
    assert lmc.Prompt([]).cuts(256) == []


def test_a_prompt_keeps_a_copy_of_its_ids():
    ids = torch.arange(10)
    prompt = lmc.Prompt(ids)
    ids[0] = 99
    assert prompt.token_ids[0] == 0
    with pytest.raises(ValueError, match="read-only"):
        prompt.token_ids[0] = 1


@pytest.mark.parametrize(
    "a, b",
    [
        ({"salt": "x"}, {"lora": "x"}),
        ({"salt": "x"}, {"salt": "y"}),
        ({"salt": "x", "lora": "y"}, {"salt": "xy"}),
        ({"prompt_embeds": "x"}, {}),
    ],
)
def test_tenants_loras_and_prompt_embeddings_have_roots_of_their_own(a, b):
    namespace = lmc.Namespace(model="m")
    assert namespace.root(**a) != namespace.root(**b)


def test_a_namespace_reads_dtypes_and_integers_and_leaves_none_out():
    assert lmc.Namespace(dtype=torch.bfloat16, tp=2).root() == lmc.Namespace(dtype="bfloat16", tp="2", pp=None).root()
    assert lmc.Namespace(pp=None).root() != lmc.Namespace(pp="None").root()


@pytest.mark.parametrize("salt, error", [("", ValueError), (b"", ValueError), (0, TypeError), (5, TypeError)])
@pytest.mark.parametrize("name", ["salt", "lora", "prompt_embeds"])
def test_one_rule_says_what_a_salt_is_wherever_it_enters(name, salt, error):
    namespace = lmc.Namespace(model="m")
    cache = lmc.EncoderCache("mem://?capacity=1KiB", namespace)
    enters = [lambda: lmc.Prompt([1], **{name: salt}), lambda: namespace.root(**{name: salt})]
    if name != "prompt_embeds":
        enters += [lambda: cache.contains("a", **{name: salt})]
    if name == "salt":
        enters += [lambda: owner_of(salt), lambda: cache.forget(salt), lambda: lmc.KVCache.forget(cache, salt)]
    for enter in enters:
        with pytest.raises(error, match=rf"{name}: expected"):
            enter()
    assert owner_of(None) == b""
    assert owner_of("5") == owner_of(b"5") != owner_of("0")
    for none in (None, "", b""):
        with pytest.raises(ValueError, match=f"^salt: expected a nonempty str or bytes, got {none!r}$"):
            cache.forget(none)


def test_a_prompt_shows_neither_its_tokens_nor_whose_it_is():
    shown = repr(lmc.Prompt([4711, 4712], [lmc.Item("a face", 0, 1)], salt="hunter2", lora="adapter"))
    assert shown == "Prompt(2 tokens, 1 items, salt=..., lora=...)"


def test_quantization_is_hashed_as_the_first_version_spelled_it():
    namespace = lmc.Namespace(quantization="fp8")
    hashed = encode_fields({"quantisation": b"fp8"})
    assert namespace.root() == blake3(hashed, derive_key_context=NAMESPACE_CONTEXT).digest()
    assert "quantization" in namespace
    assert repr(namespace) == "Namespace(quantization=b'fp8')"


def test_a_namespace_does_not_show_its_secret():
    assert "hunter2" not in repr(lmc.Namespace(secret="hunter2", model="m"))


# --- bad input: an error that names it, and nothing is written


@pytest.mark.parametrize(
    "ids, error, text",
    [
        ([1, -1, 3], ValueError, r"token_ids\[1\]: expected a token id in \[0, 2\*\*32\), got -1"),
        ([1, 2**32, 3], ValueError, r"token_ids\[1\]: .* got 4294967296"),
        ([1, -(2**63) + 5], ValueError, "overwritten already"),
        ([1.5, 2.0], TypeError, "token_ids: expected integers, got float64"),
        (torch.tensor([1.5]), TypeError, "token_ids: expected int32 or int64, got torch.float32"),
        (torch.zeros(2, 2, dtype=torch.int64), ValueError, r"token_ids: expected 1 dimension, got shape \(2, 2\)"),
        ([[1, 2], [3, 4]], ValueError, "token_ids: expected 1 dimension"),
        ([2**64], ValueError, "token_ids: expected integers that int64 can hold"),
        (torch.tensor([1], dtype=torch.int16), TypeError, "token_ids: .* got torch.int16"),
        ("abc", TypeError, "token_ids: expected a list of integers, a torch tensor"),
        ([True, False], TypeError, "token_ids: expected integers, got bool"),
    ],
)
def test_bad_token_ids_are_refused(ids, error, text):
    with pytest.raises(error, match=text):
        lmc.ops.prefix_keys(ids, [], ROOT, [2])


def test_an_overwrite_of_bad_ids_touches_nothing():
    ids = torch.tensor([3] * 500 + [-7])
    before = ids.clone()
    with pytest.raises(ValueError, match=r"token_ids\[500\].* got -7"):
        lmc.ops.apply_mm_hashes_to_token_ids(ids, ["h"], [(0, 400)])
    assert torch.equal(ids, before)
    lmc.ops.apply_mm_hashes_to_token_ids(ids[:500], ["h"], [(0, 400)])
    with pytest.raises(ValueError, match="overwritten already"):
        lmc.ops.apply_mm_hashes_to_token_ids(ids[:500], ["h"], [(0, 400)])


@pytest.mark.parametrize(
    "hashes, positions, modalities, error, text",
    [
        (["a", "b"], [(0, 1)], None, ValueError, "mm_positions: expected 2, one for each of mm_hashes, got 1"),
        (["a"], [(0, 1), (2, 1)], None, ValueError, "mm_positions: expected 1"),
        (["a"], [(0, 1)], ["image", "image"], ValueError, "modalities: expected 1"),
        (["a"], [(-1, 1)], None, ValueError, "offset: expected an integer in"),
        (["a"], [(0, -1)], None, ValueError, "length: expected an integer in"),
        (["a"], [(0, 1.5)], None, TypeError, "length: expected an integer, got float"),
        (["a"], [5], None, TypeError, r"mm_positions\[0\]: expected \(offset, length\)"),
        (["\ud800"], [(0, 1)], None, ValueError, "identifier: expected a string that UTF-8 can hold"),
        (["a"], [(0, 1)], ["\ud800"], ValueError, "modality: expected a string that UTF-8 can hold"),
        ([None], [(0, 1)], None, TypeError, "identifier: expected str, got NoneType"),
        ("a", [(0, 1)], None, TypeError, "mm_hashes: expected a sequence of str"),
        (None, [(0, 1)], None, TypeError, "mm_hashes: expected a sequence of str, got NoneType"),
        (["a"], None, None, TypeError, r"mm_positions: expected a sequence of \(offset, length\), got NoneType"),
    ],
)
def test_bad_items_are_refused_and_nothing_is_overwritten(hashes, positions, modalities, error, text):
    ids = torch.arange(10)
    with pytest.raises(error, match=text):
        lmc.ops.apply_mm_hashes_to_token_ids(ids, hashes, positions, modalities)
    assert torch.equal(ids, torch.arange(10))


@pytest.mark.parametrize(
    "ids, error, text",
    [
        (torch.zeros(4, dtype=torch.int32), TypeError, "token_ids: expected int64, got torch.int32"),
        (torch.zeros(8, dtype=torch.int64)[::2], ValueError, "token_ids: expected 1 contiguous dimension"),
        ([1, 2], TypeError, "token_ids: expected a tensor, to be overwritten in place, got list"),
        (torch.zeros(4, dtype=torch.int64, device="meta"), ValueError, "token_ids: expected a tensor on cpu or cuda"),
    ],
)
def test_ids_that_cannot_be_overwritten_in_place_are_refused(ids, error, text):
    with pytest.raises(error, match=text):
        lmc.ops.apply_mm_hashes_to_token_ids(ids, [], [])


def test_read_only_ids_are_read_but_not_overwritten():
    ids = np.arange(10)
    ids.flags.writeable = False
    assert lmc.ops.prefix_keys(ids, [], ROOT, [10]).shape == (1, 32)
    with pytest.raises(ValueError, match="token_ids: expected writable memory"):
        lmc.ops.apply_mm_hashes_to_token_ids(ids, ["a"], [(0, 3)])


@pytest.mark.parametrize(
    "root, cuts, items, error, text",
    [
        (bytes(31), [1], [], ValueError, "root: expected 32 bytes, got 31"),
        ("r" * 32, [1], [], TypeError, "root: expected bytes, got str"),
        (ROOT, [2, 1], [], ValueError, "cuts: expected strictly ascending"),
        (ROOT, [1, 1], [], ValueError, "cuts: expected strictly ascending"),
        (ROOT, [-1, 1], [], ValueError, "cuts: expected strictly ascending token counts from 0 on, got -1 at index 0"),
        (ROOT, [11], [], ValueError, "cuts: expected at most the prompt's 10 tokens, got 11"),
        (ROOT, [1.0], [], TypeError, "cuts: expected integers"),
        (ROOT, [1], None, TypeError, "items: expected a sequence of lmcache_mm.Item, got NoneType"),
        (ROOT, [1], ["a"], TypeError, r"items\[0\]: expected lmcache_mm.Item, got str"),
    ],
)
def test_bad_roots_cuts_and_items_are_refused(root, cuts, items, error, text):
    with pytest.raises(error, match=text):
        lmc.ops.prefix_keys(list(range(10)), items, root, cuts)


@pytest.mark.parametrize(
    "make, error, text",
    [
        (lambda: lmc.Prompt([1, -1]), ValueError, r"token_ids: expected ids in \[0, 2\*\*32\)"),
        (lambda: lmc.Prompt([1.0]), TypeError, "token_ids: expected integers"),
        (lambda: lmc.Prompt(None), TypeError, "token_ids: expected integers, got NoneType"),
        (lambda: lmc.Prompt("text"), TypeError, "token_ids: expected integers, got str"),
        (
            lambda: lmc.Prompt([1], lmc.Item("a", 0, 1)),
            TypeError,
            "items: expected a sequence of lmcache_mm.Item, got Item",
        ),
        (lambda: lmc.Prompt([1], turns=1), TypeError, "turns: expected a sequence of token counts, got int"),
        (lambda: lmc.Prompt([[1]]), ValueError, "token_ids: expected 1 dimension"),
        (lambda: lmc.Prompt([1], [("a", 0, 1)]), TypeError, r"items\[0\]: expected lmcache_mm.Item"),
        (lambda: lmc.Prompt([1], salt=7.0), TypeError, "salt: expected str or bytes, got float"),
        (lambda: lmc.Prompt([1], [lmc.Item("", 0, 1)]), ValueError, r"items\[0\].identifier: expected a name"),
        (lambda: lmc.Prompt([1], salt="\udfff"), ValueError, "salt: .* UTF-8"),
        (lambda: lmc.Namespace(modle="m"), TypeError, "Namespace: expected fields among .* got 'modle'"),
        (lambda: lmc.Namespace(salt="s"), TypeError, "belongs to the request"),
        (lambda: lmc.Namespace(tp=True), TypeError, "tp: expected str, bytes or int, got bool"),
        (lambda: lmc.Item("a", 2**62, 2**62), ValueError, r"offset \+ length: expected less than 2\*\*63"),
    ],
)
def test_bad_prompts_and_namespaces_are_refused(make, error, text):
    with pytest.raises(error, match=text):
        make()
