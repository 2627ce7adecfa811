"""The encoder connector, without and with the KV connector."""

from __future__ import annotations

import time
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from vllm import LLM
from vllm.distributed.ec_transfer import get_ec_transfer, has_ec_transfer

import faulty
from resets import change_weights
from small_engine import about_video, ask, ask_at_once, counts, engine, image, prompt, store, wishing


@contextmanager
def encoded(llm: LLM):
    """Yields a list that collects the numbers of patches of the images and videos that the vision encoder gets."""
    seen: list[int] = []

    def note(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        grids = named.get("grid_thw", arguments[1] if len(arguments) > 1 else None)
        seen.extend(int(np.prod(grid)) for grid in np.asarray(grids))

    hooks = llm.apply_model(lambda model: model.visual.register_forward_pre_hook(note, with_kwargs=True))
    yield seen
    hooks[0].remove()


def asking(llm: LLM, *prompts: Any, **options: Any) -> dict[str, Any]:
    """The prompts' answers, and what was encoded for them. Each prompt finds what was encoded for those before it in
    the store, unless the store hangs."""
    rows = []
    with encoded(llm) as seen:
        for one in prompts:
            rows += ask(llm, one, **options)
            if has_ec_transfer():
                with suppress(TimeoutError):
                    get_ec_transfer()._worker._puts.submit(lambda _: None).future.result(2)
        return {"rows": rows, "encoded": list(seen)}


def forgetful(llm: LLM) -> None:
    """Shrinks vLLM's own encoder cache to one image of 36 embeddings, so that a new image evicts any unneeded one."""
    manager = llm.llm_engine.engine_core.engine_core.scheduler.encoder_cache_manager
    assert manager.num_freeable_slots == manager.cache_size
    manager.cached.clear()
    manager.num_embeds_by_hash.clear()
    manager.freeable.clear()
    manager.cache_size = manager.num_free_slots = manager.num_freeable_slots = 40


ABOUT = [
    prompt(f"{text} | ?", image(0)) for text in ("what is", "one more time, what is", "and again, in other words,")
]
BOTH = prompt("first | and then | ?", image(0), image(1))


def encoder() -> dict[str, Any]:
    """Images and a video seen before, at other places and in other engines, without and with LMCacheMMConnector."""
    with engine() as llm:
        questions = [*ABOUT, BOTH, about_video(0), about_video(1)]
        seen: dict[str, Any] = {"expected": asking(llm, *questions)}
        llm.apply_model(change_weights)
        seen["expected changed"] = ask(llm, ABOUT[0])
    with store() as url:
        with engine(encoder=url) as llm:
            seen["first"] = asking(llm, ABOUT[0], about_video(0))
        with (
            engine(encoder=url, max_num_batched_tokens=64, enable_chunked_prefill=True) as llm,
            encoded(llm) as patches,
        ):
            seen["at once"] = {"rows": ask_at_once(llm, ABOUT), "encoded": list(patches)}
            patches.clear()
            seen["one of two known"] = {"rows": ask(llm, BOTH), "encoded": list(patches)}
            seen["videos"] = asking(llm, about_video(0), about_video(1))
            seen["counts"] = counts(llm)
            llm.llm_engine.engine_core.engine_core.reset_encoder_cache()
            seen["after vLLM forgot"] = asking(llm, BOTH)
        options = {"extra": {"opaque_tails": True}, "enable_prefix_caching": True}
        with engine(url, encoder=url, **options) as llm:
            seen["with KV"] = asking(llm, *ABOUT, BOTH)
            seen["with KV, again"] = asking(llm, *ABOUT, BOTH)
            llm.apply_model(change_weights)
            llm.reset_prefix_cache(reset_connector=True)
            llm.llm_engine.engine_core.engine_core.reset_encoder_cache()
            seen["changed weights"] = asking(llm, ABOUT[0])
    return seen


def encoder_identity() -> dict[str, Any]:
    """Identifiers that clients choose; tenants; requests that disable the cache; missing items."""
    one, two, three = (prompt("| what is it? ", image(i)) for i in range(3))
    with engine() as llm:
        seen: dict[str, Any] = {"expected": asking(llm, one, two, three)}

    def named(about: dict[str, Any], *uuids: str) -> dict[str, Any]:
        return {**about, "multi_modal_uuids": {"image": list(uuids)}}

    with store() as url, engine(encoder=url, mm_processor_cache_gb=0) as llm:
        # vLLM's identifiers are counters here, unless clients choose them.
        forgetful(llm)
        seen["counters"] = asking(llm, one, two, one, two)
        seen["one uuid"] = asking(llm, named(one, "x"), three, named(two, "x"), three, named(one, "x"))
        seen["honest"] = asking(llm, one, two, three)
        seen["tenants"] = asking(llm, *({**one, "cache_salt": salt} for salt in ("a", "b", "a", "b")))
        four = prompt("| what is it? ", image(3))
        seen["no store"] = asking(llm, four, sampling=wishing({"store": False}))
        seen["not stored"] = asking(llm, four)
        seen["no load"] = asking(llm, four, sampling=wishing({"load": False}))
        seen["stored"] = asking(llm, four)
        grid = {"image_grid_thw": torch.tensor([[1, 12, 12]])}
        seen["no image"] = asking(llm, {"prompt": one["prompt"], "multi_modal_data": {"image": grid}})
        seen["afterwards"] = asking(llm, one)
    with store() as url, engine(encoder=url, mm_processor_cache_gb=0) as llm:
        seen["one uuid twice"] = asking(llm, named(prompt("| and | ?", image(0), image(1)), "y", "y"), one, two)
    return seen


ENCODER_FAULTS = (
    *("Fails", "FailsToTell", "Lies", "Loses", "Hangs", "HangsToTell", "Emptied"),
    *("FailsToStore", "HangsToStore", "Corrupts"),
)


def encoder_trouble() -> dict[str, Any]:
    """Stores that fail, lie, lose, corrupt and hang, and one that is emptied after it was read."""
    about = {fault: prompt(f"{fault}: | ?", image(i)) for i, fault in enumerate(ENCODER_FAULTS)}
    other = prompt("| what is it? ", image(100))
    with engine() as llm:
        seen: dict[str, Any] = {fault: {"expected": ask(llm, one)} for fault, one in about.items()}
    with store() as url, engine(encoder=url, encoder_extra={"timeout_s": 1}) as llm:
        forgetful(llm)
        for fault, one in about.items():
            if not fault.endswith("ToStore"):
                asking(llm, one, other)
            before, begun = counts(llm), time.monotonic()
            with faulty.encoder_misbehaving(llm, getattr(faulty, fault)):
                seen[fault] |= asking(llm, one)
                seen[fault]["loaded"] = counts(llm)["encoder_loaded_items"] - before["encoder_loaded_items"]
                ask(llm, other)
                seen[fault]["seconds"] = time.monotonic() - begun
                until = time.monotonic() + 1
                while fault == "HangsToStore" and time.monotonic() < until:
                    time.sleep(0.1)  # nothing is stored while the store hangs
                seen[fault]["then"] = asking(llm, {**one, "prompt": one["prompt"] + "again"}, prompt("words"))
            after = counts(llm)
            seen[fault]["counts"] = {name: after[name] - before[name] for name in after}
    return seen


def encoder_ranks() -> dict[str, Any]:
    """Two workers in separate processes."""
    with store() as url, engine(encoder=url, tensor_parallel_size=2) as llm:
        forgetful(llm)
        other = prompt("| what is it? ", image(1))
        return {"got": ask(llm, ABOUT[0], other, ABOUT[1], other, ABOUT[2]), "counts": counts(llm)}
