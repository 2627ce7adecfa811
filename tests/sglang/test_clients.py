"""What SGLang lets one client do to another, as docs/sglang.md says, and where the backend does not start for it."""

from __future__ import annotations

from array import array

import pytest
import torch
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.managers.mm_utils import hash_feature
from sglang.srt.managers.schedule_batch import Modality, MultimodalDataItem, Req
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.utils import get_storage_hash_str
from sglang.srt.sampling.sampling_params import SamplingParams

from hosts import PAGE, start, storage_config, write_model
from lmcache_mm.sglang import HiCacheBackend

STORE = {"store": "mem://?capacity=1MiB"}
MULTIMODAL = {
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "model_type": "qwen2_vl",
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2},
}


def key_of(feature, claimed=None):
    """The name of a page that an image fills."""
    item = MultimodalDataItem(modality=Modality.IMAGE, feature=feature)
    if claimed:
        item.set_hash(int(claimed, 16))  # as SGLang takes "mm_hashes" of a request
    item.set_pad_value()
    return get_storage_hash_str(item.padding_sequence(PAGE), None, page_size=PAGE)


def test_sglang_takes_a_clients_word_for_what_an_image_is():
    mine, yours = torch.rand(8, 6), torch.rand(8, 6)
    assert key_of(mine) != key_of(yours)
    (hash_of_yours,) = (f"{hash_feature(yours):x}",)
    assert key_of(mine, claimed=hash_of_yours) == key_of(yours)


def test_sglang_takes_token_ids_for_an_image():
    item = MultimodalDataItem(modality=Modality.IMAGE, feature=torch.rand(8, 6))
    item.set_pad_value()
    tokens = item.padding_sequence(PAGE)
    made = Req("id", "", array("q", tokens), SamplingParams())
    key = RadixKey(made.origin_input_ids, extra_key=made.extra_key, cache_salt=made.cache_salt)
    assert get_storage_hash_str(key, None, page_size=PAGE) == key_of(item.feature)


def test_sglang_names_an_image_by_its_bytes_without_their_shape():
    pixels = torch.rand(8, 6)
    assert key_of(pixels) == key_of(pixels.reshape(4, 12))


def request(**fields):
    made = Req("id", "", array("q", range(PAGE)), SamplingParams(), **fields)
    key = RadixKey(array("q", range(PAGE)), extra_key=made.extra_key, cache_salt=made.cache_salt)
    return get_storage_hash_str(key, None, page_size=PAGE)


def test_sglang_takes_a_clients_word_for_its_adapter():
    adapter = LoRARef.deterministic_id("adapter", "/adapters/one")
    assert request(extra_key=adapter) == request(lora_id=adapter) != request()


def test_salts_are_apart_in_sglang():
    names = [request(), request(cache_salt="a"), request(cache_salt="b"), request(extra_key="a")]
    names += [request(extra_key="a", cache_salt="b"), request(extra_key="ab")]
    assert len({name for (name,) in names}) == len(names)


def test_a_model_with_items_needs_clients_that_are_trusted(tmp_path):
    start(write_model(tmp_path / "multimodal", **MULTIMODAL))
    with pytest.raises(ValueError, match=r'"mm_content_hashes".* token ids .*"identifiers": "trust"'):
        HiCacheBackend(storage_config(STORE), {})
    HiCacheBackend(storage_config({**STORE, "identifiers": "trust"}), {}).close()


def test_adapters_need_clients_that_are_trusted_and_are_named_by_their_files(tmp_path, model):
    folder = tmp_path / "adapter"
    folder.mkdir()
    lora = {"enable_lora": True, "lora_paths": [f"adapter={folder}"], "max_lora_rank": 8}
    start(model, lora_target_modules=["q_proj"], **lora)
    with pytest.raises(ValueError, match='adapters by the "extra_key"'):
        HiCacheBackend(storage_config(STORE), {})
    trusted = {**STORE, "identifiers": "trust"}
    for path in (str(folder), "hub/adapter"):
        start(model, lora_target_modules=["q_proj"], **lora | {"lora_paths": [f"adapter={path}"]})
        with pytest.raises(ValueError, match=f'no local files .* adapter .*{path}.* "weights": "NAME"'):
            HiCacheBackend(storage_config(dict(trusted)), {})
    HiCacheBackend(storage_config({**trusted, "weights": "named"}), {}).close()
    start(model, lora_target_modules=["q_proj"], **lora)
    roots = []
    for content in (b"one", b"two"):
        (folder / "adapter_model.safetensors").write_bytes(content)
        backend = HiCacheBackend(storage_config(dict(trusted)), {})
        roots.append(backend._namespace.root())
        backend.close()
    assert roots[0] != roots[1]
