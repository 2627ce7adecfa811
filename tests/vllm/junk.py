"""Hypothesis strategies for anything that clients may write into requests."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import strategies as st

TEXT = st.text(st.characters(codec=None), max_size=8)  # including lone surrogates, which JSON allows
ATOMS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.just("lmcache_mm")
JSON = st.recursive(
    ATOMS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=8
)
WISHES = JSON | st.dictionaries(st.sampled_from(("load", "store", "wait")), JSON)
PARAMS = JSON | st.fixed_dictionaries({"lmcache_mm": WISHES}, optional={"do_remote_decode": JSON})


class Data(dict[str, Any]):
    """An item's processed data, as in vLLM: fields with data."""


def _field(data: Any) -> Any:
    return SimpleNamespace(data=data, field=SimpleNamespace(keep_on_cpu=False))


DATA = st.none() | st.dictionaries(TEXT | st.just("image_grid_thw"), JSON.map(_field), max_size=2).map(Data)
ITEM = st.builds(
    SimpleNamespace,
    data=DATA,
    modality=st.sampled_from(("image", "video", "audio")) | TEXT,
    identifier=TEXT,
    mm_position=st.builds(SimpleNamespace, offset=st.integers(0, 90), length=st.integers(1, 40)),
)
LORA = st.none() | st.builds(SimpleNamespace, lora_name=TEXT, lora_path=TEXT, lora_int_id=st.integers(1, 9))
FIELDS: dict[str, Any] = {
    "mm_features": st.lists(ITEM, max_size=2),
    "cache_salt": JSON,
    "lora_request": LORA,
    "prompt_embeds": JSON,
    "prompt_is_token_ids": JSON,
    "kv_transfer_params": PARAMS,
    "ec_transfer_params": PARAMS,
}
