"""The digest of an engine's weights, which follows every change of them."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

VLLM = importlib.util.find_spec("vllm")  # this folder also looks like a package vllm, but without an origin

pytestmark = pytest.mark.skipif(
    (VLLM is None or VLLM.origin is None) and "LMCACHE_MM_REQUIRE_VLLM" not in os.environ,
    reason="no vLLM (tests/vllm/requirements*.txt)",
)


class Model(torch.nn.Module):
    """Weights larger than one read, odd sizes, views of one memory, a buffer, an empty tensor."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)
        self.large = torch.nn.Parameter(torch.randn(3, 1 << 20, generator=random))
        self.odd = torch.nn.Parameter(torch.randn(3, 7, generator=random).bfloat16())
        both = torch.randn(8, 5, generator=random)
        self.one, self.transposed = torch.nn.Parameter(both[:4]), torch.nn.Parameter(both[4:].t())
        self.register_buffer("scale", torch.tensor(0.5))
        self.register_buffer("none", torch.empty(0))


@pytest.fixture(scope="module")
def weights() -> Any:
    """Imported here, since an import at the top would load vLLM in every test run."""
    return importlib.import_module("lmcache_mm.vllm.kv.weights")


def digest(weights: Any, model: Any, draft: Any = None) -> bytes:
    return weights.digest_of(SimpleNamespace(get_model=lambda: model, get_draft_model=lambda: draft))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "the sign of all": lambda m: m.large.data.neg_(),
    "twice as large": lambda m: m.large.data.mul_(2),
    "one bit of one number": lambda m: m.odd.data.view(torch.int16)[2, 6].bitwise_xor_(1),
    "rows exchanged": lambda m: m.large.data.copy_(m.large.data[[1, 0, 2]]),
    "behind a view": lambda m: m.transposed.data[4, 3].add_(1),
    "a buffer": lambda m: m.scale.fill_(0.25),
    "another name": lambda m: setattr(m, "other", m.__dict__["_parameters"].pop("odd")),
    "another shape": lambda m: setattr(m, "one", torch.nn.Parameter(m.one.data.view(5, 4))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_digest_changes_with_the_weights(weights, change):
    model = Model()
    before = digest(weights, model)
    assert before == digest(weights, Model())
    CHANGES[change](model)
    assert digest(weights, model) != before


def test_a_drafter_has_weights_too(weights):
    model, draft = Model(), Model()
    before = digest(weights, model, draft)
    draft.scale.fill_(0.25)
    assert len({before, digest(weights, model, draft), digest(weights, model)}) == 3


def test_weights_that_cannot_be_read_have_no_digest(weights):
    assert weights.digest_of(None) == b""
    model = torch.nn.Module()
    model.register_buffer("sparse", torch.eye(3).to_sparse())
    assert digest(weights, model) == b""
