"""Operations inside torch.compile: whole graphs with the same effects as the same calls outside, in program order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

import lmcache_mm as lmc
from layouts import PAGES, TOKENS, PagedCache, blocks_outermost, period_251, strided_runs
from lmcache_mm import operators, ops, reference

ROOT = bytes(range(32))
ITEMS = [lmc.Item("a", 3, 5), lmc.Item("b", 6, 20, "audio")]


def compiled(function: Any, backend: Any = "aot_eager") -> Any:
    torch._dynamo.reset()
    return torch.compile(function, backend=backend, fullgraph=True)


def layers(pages: int = 7, apart: bool = True) -> tuple[list[torch.Tensor], lmc.KVLayout]:
    whole = torch.arange(3 * pages * 2 * TOKENS * 24, dtype=torch.int32).view(3, pages, 2, TOKENS, 24)
    kv = [layer.clone() for layer in whole] if apart else list(whole)
    return kv, lmc.KVLayout.from_tensors(kv, page_tokens=TOKENS, page_dim=0, token_dim=2)


def step(layout, kv, token_ids, blocks, slots, payload, sums):
    """A step of an inference loop: makes a prompt's keys, loads pages, computes into them, and stores."""
    keys = ops.prefix_keys(token_ids, ITEMS, ROOT, [4, 16])
    content = ops.apply_mm_hashes_to_token_ids(token_ids.clone(), ["a", "b"], [(3, 5), ITEMS[1]], ["image", "audio"])
    intact = ops.scatter_pages(layout, blocks, payload, checksums=sums)
    before = ops.gather_pages(layout, blocks, tokens=TOKENS * len(blocks) - 1)
    for tensor in kv:
        tensor[2] = tensor[1] + 1
    rows = ops.gather_tokens(layout, slots)
    ops.scatter_tokens(layout, slots.flip(0), rows)
    new_sums = torch.empty(2, dtype=torch.int64)
    after = ops.gather_pages(layout, [blocks, blocks.flip(0)], checksums=new_sums)
    return keys, content, intact, before, rows, *after, new_sums


@pytest.mark.parametrize("apart", [True, False], ids=["a storage a layer", "one storage"])
def test_a_compiled_step_does_what_it_does_outside(apart: bool):
    run = compiled(step)
    for blocks, slots, tokens in (([1, 3], [9, 4, 8], 40), ([5, 1, 2], [8, 4, 11, 27], 61)):
        (kv, layout), (other_kv, other) = layers(apart=apart), layers(apart=apart)
        payload = period_251(layout.payload_bytes(len(blocks)))
        sums = torch.tensor([reference.checksum(payload)])
        rest = (torch.arange(tokens) % 17, torch.tensor(blocks), torch.tensor(slots), payload, sums)
        for got, want in zip(run(layout, kv, *rest), step(other, other_kv, *rest), strict=True):
            assert torch.equal(got, want)
        assert all(torch.equal(a, b) for a, b in zip(kv, other_kv, strict=True))


def columns() -> PagedCache:
    """In a storage that none of the caller's contiguous tensors covers."""
    tensor = torch.empty_strided((PAGES, TOKENS, 24), (TOKENS * 24, 1, TOKENS))
    memory = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    memory.copy_(period_251(len(memory)))
    layout = lmc.KVLayout.from_tensors([tensor], page_tokens=TOKENS, page_dim=0, token_dim=1)
    return PagedCache(memory, layout, lambda ids: tensor[ids])


@pytest.mark.parametrize("make", [strided_runs, blocks_outermost, columns])
def test_a_copy_of_any_layout_is_that_of_the_reference_where_the_compiler_moves_the_cache(make):
    cache, expected = make(), make()

    def work(blocks, payload):
        ops.scatter_pages(cache.layout, [blocks], (payload,))
        return ops.gather_pages(cache.layout, blocks.flip(0))

    payload = period_251(cache.layout.payload_bytes(3))
    got = compiled(work)(torch.tensor([4, -1, 0]), payload)
    reference.scatter_pages(expected.layout, expected.memory, [4, -1, 0], payload)
    assert torch.equal(got, reference.gather_pages(expected.layout, expected.memory, [0, -1, 4], 3 * TOKENS))
    assert torch.equal(cache.memory, expected.memory)


@pytest.mark.parametrize("apart", [True, False], ids=["a storage a layer", "one storage"])
def test_inductor_copies_no_cache(apart: bool, monkeypatch: pytest.MonkeyPatch):
    kv, layout = layers(apart=apart)
    assert all(a is b for a, b in zip(layout.memory, kv if apart else [kv[0]._base], strict=True))
    seen, layout_at = [], operators._layout_at
    monkeypatch.setattr(operators, "_layout_at", lambda *at: seen.append(list(at[1])) or layout_at(*at))

    def work(blocks, others, payload):
        ops.scatter_pages(layout, blocks, payload)
        ops.scatter_pages(layout, others, payload)
        return ops.gather_pages(layout, blocks)

    payload = period_251(layout.payload_bytes(2))
    with torch._inductor.config.patch(force_disable_caches=True):
        got, (code,) = run_and_get_code(compiled(work, "inductor"), torch.tensor([2, 4]), torch.tensor([0, 1]), payload)
    assert torch.equal(got, payload)
    assert seen == [[tensor.data_ptr() for tensor in layout.memory]] * 3
    assert "kernel(" not in code  # only calls of operators
    assert ".copy_(" not in code


def test_one_graph_serves_caches_of_one_form_and_no_other():
    counter = CompileCounterWithBackend("aot_eager")
    run = compiled(ops.gather_pages, counter)
    for pages, graphs in ((7, 1), (7, 1), (9, 2), (7, 2)):  # a layout is freed before the next but one is made
        kv, layout = layers(pages)
        kv[1].mul_(pages)
        assert torch.equal(run(layout, torch.tensor([2, pages - 1])), ops.gather_pages(layout, [2, pages - 1]))
        assert counter.frame_count == graphs


def test_what_is_wrong_outside_is_wrong_inside():
    kv, layout = layers()
    run = compiled(ops.gather_pages)
    with pytest.raises(ValueError, match=r"block_ids\[0\]: expected an id in \[0, 7\), or -1 to skip, got 7"):
        run(layout, torch.tensor([7]))
    for elsewhere in (
        replace(layout, memory=()),
        replace(layout, memory=layout.memory[1:]),
        replace(layout, num_pages=8),
    ):
        with pytest.raises(torch._dynamo.exc.Unsupported):  # the compiler cannot know whose planes these are
            run(elsewhere, torch.tensor([1]))
    with pytest.raises(RuntimeError, match="given one other strides"):
        operators._layout([kv[0].transpose(0, 1)], layout._description)


def test_torch_finds_nothing_wrong_with_the_operators():
    _, layout = layers()
    at, sums = (list(layout.memory), layout._description), torch.zeros(2, dtype=torch.int64)
    ids, items = [torch.tensor([1, 2]), torch.tensor([3])], (["a"], [2], [3], ["image"])
    pages, rows = ([torch.zeros(3 * n * b, dtype=torch.uint8) for n in (2, 1)] for b in (layout.page_bytes, 192))
    for operator, *arguments in (
        ("apply_mm_hashes", torch.arange(9), *items, False),
        ("prefix_keys", torch.arange(9), *items, list(ROOT), torch.tensor([4, 9]), True),
        ("gather", *at, False, ids, pages, [7, 4], sums, 0, 0),
        ("gather", *at, True, ids, rows, None, None, 2, 1),
        ("scatter", *at, False, ids, pages, sums, 0, 0),
        ("scatter", *at, True, ids, rows, None, 2, 1),
    ):
        results = torch.library.opcheck(getattr(torch.ops.lmcache_mm, operator).default, tuple(arguments))
        assert set(results.values()) == {"SUCCESS"}
