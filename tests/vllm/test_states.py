"""Layers that keep a state, beside attention: vLLM's own scheduler and caches, and a model that checks what it reads.

The model keeps in an attention page, for every token, which prefix it is the last one of, and in a page of states which
prefix it is the state after. Before it computes a step it looks whether pages hold what vLLM says that they hold.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import random
import time
import uuid
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lmcache_mm.cache import record_key
from lmcache_mm.prompt import Item
from lmcache_mm.stores import open_store

VLLM = importlib.util.find_spec("vllm")  # this folder looks like a package of that name: it has no origin

pytestmark = pytest.mark.skipif(
    (VLLM is None or VLLM.origin is None) and "LMCACHE_MM_REQUIRE_VLLM" not in os.environ,
    reason="no vLLM (tests/vllm/requirements*.txt)",
)

BLOCK, BLOCKS, BUDGET, PROMPT = 32, 28, 128, 300
STOP = 299  # a token that ends an answer
MODEL = {
    "architectures": ["Lfm2ForCausalLM"],
    "model_type": "lfm2",
    "conv_L_cache": 3,
    "conv_dim": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "layer_types": ["conv", "full_attention"],
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "vocab_size": 300,
}


def prefixes(token_ids: list[int]) -> np.ndarray:
    """Of the first 0, 1, 2 … tokens a number each, above 0."""
    out = [1]
    for token in token_ids:
        out.append((out[-1] * 1_000_003 + token + 1) % ((1 << 61) - 1))
    return np.array(out, np.int64)


class Engine:
    """vLLM's scheduler with the connector, and a worker whose model writes and checks prefixes. ahead: a step is
    planned and computed before the scheduler is told of the one before it, as by vLLM's asynchronous scheduling."""

    def __init__(
        self, cases: Any, url: str, folder: Path, kind: str, extra: dict[str, Any], ahead: bool = False, **options: Any
    ) -> None:
        sched = importlib.import_module(f"vllm.v1.core.sched.{'async_scheduler' if ahead else 'scheduler'}")
        self.outputs = importlib.import_module("vllm.v1.outputs")
        utils = importlib.import_module("vllm.v1.core.kv_cache_utils")
        self.requests = importlib.import_module("vllm.v1.request")
        self.hashing = importlib.import_module("vllm.utils.hashing").sha256
        utils.init_none_hash(self.hashing)
        (folder / "config.json").write_text(json.dumps(MODEL))
        transfer = cases.KVTransferConfig(
            kv_connector="LMCacheMMConnector",
            kv_connector_module_path="lmcache_mm.vllm.connector",
            kv_role="kv_both",
            kv_connector_extra_config={"store": url, "chunk_tokens": 64, "weights": "w", **extra},
        )
        config = (
            importlib.import_module("vllm.engine.arg_utils")
            .EngineArgs(
                model=str(folder),
                skip_tokenizer_init=True,
                load_format="dummy",
                dtype="float32",
                max_model_len=512,
                max_num_seqs=4,
                max_num_batched_tokens=BUDGET,
                block_size=BLOCK,
                num_gpu_blocks_override=BLOCKS,
                enable_prefix_caching=True,
                mamba_cache_mode="align",
                enforce_eager=True,
                kv_transfer_config=transfer,
                async_scheduling=False,
                **options,
            )
            .create_engine_config()
        )
        config.cache_config.num_gpu_blocks = BLOCKS
        config.scheduler_config.async_scheduling = ahead  # vLLM leaves it out on CPUs
        self.caches_config = cases.kv_cache_config_of(kind, "BLHNC", BLOCKS)
        sizes = utils.resolve_kv_cache_block_sizes(self.caches_config, config)
        self.hash_tokens = self.caches_config.hash_block_size = sizes[1]
        self.scheduler = (sched.AsyncScheduler if ahead else sched.Scheduler)(
            vllm_config=config,
            kv_cache_config=self.caches_config,
            structured_output_manager=SimpleNamespace(accept_tokens=lambda *_: True),
            block_size=sizes[0],
            hash_block_size=sizes[1],
        )
        self.hasher = utils.get_request_block_hasher(self.hash_tokens, self.hashing)
        caches = cases.caches_of(kind, "BLHNC", blocks=BLOCKS)
        base = importlib.import_module("lmcache_mm.vllm.connector")
        self.worker = base.LMCacheMMConnector(config, base.KVConnectorRole.WORKER, self.caches_config)
        self.worker.register_kv_caches(caches)
        self.scheduler.connector.set_xfer_handshake_metadata({0: self.worker.get_handshake_metadata()})
        self.pages: list[np.ndarray] = []  # of each table, [page, token]; a state is the first number of its page
        for group in self.caches_config.kv_cache_groups:
            first = caches[group.layer_names[0]].view(torch.uint8).flatten(1)
            self.pages.append(first.view(torch.int64).numpy())
            assert self.pages[-1].ctypes.data == caches[group.layer_names[0]].data_ptr()
        self.state_table = len(self.pages) - 1
        self.saved: set[bytes] = set()  # keys of records
        self.ends: dict[bytes, int] = {}  # of prefixes
        self.loaded_tokens = self.failed_loads = 0
        self.ahead, self.untold = ahead, list[tuple[Any, Any]]()  # steps, and what came of them
        self.stops_at: int | None = None  # the length of a request that its answer ends at
        self.scheduler.connector._scheduler._leave_out = self._must_not_fail

    def close(self) -> None:
        self.worker.shutdown()
        self.scheduler.connector.shutdown()

    @staticmethod
    def _must_not_fail(_: object) -> None:
        raise  # noqa: PLE0704 - what is being handled

    def add(self, name: str, token_ids: list[int], answer: int, resumable: bool = False, **params: Any) -> Any:
        sampling = importlib.import_module("vllm").SamplingParams(
            max_tokens=answer, ignore_eos=True, stop_token_ids=[STOP], extra_args=params
        )
        request = self.requests.Request(name, token_ids, sampling, None, block_hasher=self.hasher, resumable=resumable)
        self.scheduler.add_request(request)
        return request

    def run(self) -> None:
        """Until all requests have ended."""
        until = time.monotonic() + 60
        while self.scheduler.has_unfinished_requests():
            assert time.monotonic() < until
            self.step()
        self.tell_all()

    def step(self) -> None:
        step = self.scheduler.schedule()
        computed = {one.req_id: one.num_computed_tokens for one in step.scheduled_new_reqs}
        cached = step.scheduled_cached_reqs
        computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for page in step.new_block_ids_to_zero or ():
            for pages in self.pages:
                pages[page] = 0
        for copy in step.kv_cache_block_copies or ():
            for pages in self.pages:
                pages[copy.dst_block_id] = pages[copy.src_block_id]
        records = [record for save in step.kv_connector_metadata.saves for record in save.records]
        self.saved |= {record_key(record.key, 256 * record.table) for record in records}
        for ours in self.scheduler.connector._scheduler._requests.values():
            named = ours.tracker.records(ours.request.all_token_ids, ours.tracker.tokens) if ours.tracker else ()
            self.ends |= {record.key: record.end for record in named}
        self.worker.bind_connector_metadata(step.kv_connector_metadata)
        self.worker.start_load_kv(None)
        sampled = []
        for name, scheduled in step.num_scheduled_tokens.items():
            request = self.scheduler.requests[name]
            token_ids = list(request.all_token_ids)
            if not (self.ahead and request.drop_stale_output and request.num_stale_output_tokens):
                for _, before in self.untold:
                    if name in before.req_id_to_index:
                        token_ids += before.sampled_token_ids[before.req_id_to_index[name]]
            tables = self.scheduler.kv_cache_manager.get_block_ids(name)
            of = prefixes(token_ids)
            self.compute(of, tables, computed[name], scheduled)
            ends = computed[name] + scheduled == len(token_ids)
            sampled.append([STOP if len(token_ids) == self.stops_at else int(of[-1]) % 250] if ends else [])
        self.worker.wait_for_save()
        told = self.worker.get_transfer_results(set(step.finished_req_ids))
        self.failed_loads += len(told.failed_recving)
        output = self.outputs.KVConnectorOutput(
            finished_recving=told.finished_recving or None,
            failed_recving=told.failed_recving,
            kv_connector_worker_meta=self.worker.build_connector_worker_meta(),
        )
        self.worker.clear_connector_metadata()
        names = list(step.num_scheduled_tokens)
        of_names = {name: i for i, name in enumerate(names)}
        self.untold.append((step, self.outputs.ModelRunnerOutput(names, of_names, sampled, kv_connector_output=output)))
        self.tell_all(but=int(self.ahead and bool(names)))
        stats = self.worker.get_kv_connector_stats()
        if stats is not None:
            self.loaded_tokens += int(stats.data.get("loaded_tokens", 0))

    def tell_all(self, but: int = 0) -> None:
        """Tells the scheduler of the steps that it does not know of, but the last `but` ones."""
        while len(self.untold) > but:
            self.scheduler.update_from_output(*self.untold.pop(0))

    def compute(self, of: np.ndarray, tables: tuple[list[int], ...], computed: int, scheduled: int) -> None:
        end = computed + scheduled
        for group, pages, blocks in zip(self.caches_config.kv_cache_groups, self.pages, tables, strict=True):
            spec = group.kv_cache_spec
            if hasattr(spec, "mamba_cache_mode"):
                assert not computed or blocks[(computed - 1) // BLOCK]
                assert not computed or pages[blocks[(computed - 1) // BLOCK], 0] == of[computed], "the state"
                assert blocks[(end - 1) // BLOCK]
                pages[blocks[(end - 1) // BLOCK], 0] = of[end]
                for tokens, column in self.checkpoints(spec, blocks, computed, end):
                    pages[blocks[column], 0] = of[tokens]
                continue
            window = getattr(spec, "sliding_window", None) or computed + 1
            tokens = np.arange(max(0, computed + 1 - window), end)
            of_tokens = np.array(blocks)[tokens // BLOCK]
            assert of_tokens.all()
            before = tokens < computed
            found = pages[of_tokens[before], tokens[before] % BLOCK]
            assert (found == of[tokens[before] + 1]).all(), "what attention reads"
            pages[of_tokens[~before], tokens[~before] % BLOCK] = of[tokens[~before] + 1]

    def checkpoints(self, spec: Any, blocks: list[int], computed: int, end: int) -> list[tuple[int, int]]:
        """The states that a step keeps on its way, by vLLM's own rule: after how many tokens, and in which column."""
        if not spec.num_prefill_checkpoint_blocks:
            return []
        rule = importlib.import_module("vllm.model_executor.layers.mamba.checkpoint").compute_mamba_prefill_checkpoints
        aligned = self.scheduler.kv_cache_manager.coordinator._cache_hit_alignment_tokens
        found = rule([end], [end - computed], self.hash_tokens, BLOCK, 1, False, aligned)
        # vLLM's kernels write a state that nobody keeps into page 0.
        return [(computed + offset, column) for offset, column in zip(*found, strict=True) if offset and blocks[column]]


@pytest.fixture
def engine(cases, url, tmp_path, monkeypatch):
    monkeypatch.setattr("lmcache_mm.vllm.kv.worker.digest_of", lambda _: b"weights")
    opened = []

    def new(kind: str = "small states", extra: dict[str, Any] | None = None, **options: Any) -> Engine:
        opened.append(Engine(cases, url, tmp_path, kind, extra or {}, **options))
        return opened[-1]

    yield new
    for one in opened:
        one.close()


KINDS = {
    "states": {"kind": "small states"},
    "states and windows": {"kind": "small states and windows"},
    "states that steps keep on their way": {"kind": "small states on the way"},
    "states within blocks": {"kind": "small states", "prefix_match_unit": 16},
    "states every 64 tokens, and of answers": {
        "kind": "small states",
        "extra": {"state_tokens": 64, "store_generated": True},
    },
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ahead", [False, True], ids=["one step at a time", "a step ahead"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_step_reads_what_another_prefix_has_left(engine, url, kind, ahead, seed):
    """Prompts that part at any place, more of them at once than there are pages for, vLLM's own cache emptied now and
    then, and records that are lost one by one."""
    one, rng = engine(**KINDS[kind], ahead=ahead), random.Random(seed)
    stems = [[rng.randrange(250) for _ in range(PROMPT)] for _ in range(2)]
    with closing(open_store(url)) as store:
        for turn in range(8):
            for i in range(rng.randint(1, 5)):
                stem = rng.choice(stems)
                prompt = stem[: rng.randint(1, PROMPT)] + [rng.randrange(250) for _ in range(rng.choice([0, 1, 40]))]
                one.add(f"{turn}-{i}", prompt, rng.choice([1, 20, 70]))
            one.run()
            if rng.random() < 0.6:
                empty(one)
            if rng.random() < 0.5:
                store.delete(rng.sample(sorted(one.saved), 2))
    assert one.loaded_tokens > 0


def empty(one: Engine) -> None:
    """vLLM's own cache, once no load of a request that has ended is under way."""
    until = time.monotonic() + 30
    while not one.scheduler.reset_prefix_cache():
        assert time.monotonic() < until
        one.step()
        one.tell_all()


PARTS = random.Random(5).choices(range(250), k=PROMPT)


def ends_of(one: Engine, tokens: int = PROMPT, tail: int = 0, answer: int = 1) -> tuple[int, set[int]]:
    """What a prompt of so many of PARTS and so many others hits in the store, and the tokens behind which states were
    saved. vLLM's own cache is empty, and what was saved before is in the store."""
    until = time.monotonic() + 30
    while one.scheduler.connector.has_pending_push_work():
        assert time.monotonic() < until
        one.step()
    assert one.scheduler.reset_prefix_cache()
    loaded, before = one.loaded_tokens, set(one.saved)
    one.add(uuid.uuid4().hex, PARTS[:tokens] + [250 + i for i in range(tail)], answer)
    one.run()
    states = {key[:32] for key in one.saved - before if int.from_bytes(key[32:34], "little") // 256 == one.state_table}
    return one.loaded_tokens - loaded, {one.ends[key] for key in states}


def test_states_are_kept_where_prompts_end_and_where_they_part(engine):
    one = engine("small states")
    assert ends_of(one) == (0, {288})
    assert ends_of(one) == (288, set())
    assert ends_of(one, 200, 60) == (0, {192, 256})  # in one that parts from it, at the chunk before
    assert ends_of(one, 200, 61) == (256, set())
    assert ends_of(one, 210, 61) == (192, {256})
    assert one.failed_loads == 0


def test_a_state_is_kept_where_the_last_item_ends(engine):
    """vLLM is told to end a step there."""
    one = engine("small states")
    connector = one.scheduler.connector._scheduler
    connector._naming._items = lambda _: [Item("picture", 20, 150, "image")]
    assert ends_of(one) == (0, {160, 288})
    assert ends_of(one, 175, 100) == (160, {256})


def test_a_prompt_of_whole_blocks_can_be_asked_again_and_go_on(engine):
    """A state cannot step back a token; the one behind the last token is for prompts that go on."""
    one = engine("small states")
    assert ends_of(one, 256) == (0, {224, 256})
    assert ends_of(one, 256) == (224, set())
    assert ends_of(one, 256, 10) == (256, set())


@pytest.mark.parametrize("lost", ["attention", "state"])
def test_a_record_that_is_lost_between_match_and_load_costs_the_hit(engine, url, lost):
    """The whole request is computed, and what was lost is stored anew."""
    one = engine("small states")
    ends_of(one)
    scheduler = one.scheduler.connector._scheduler
    plan_load, asked = scheduler.plan_load, []

    def lose(*arguments: Any) -> None:
        plan_load(*arguments)
        asked.append(arguments)
        ((load, release),) = scheduler._loading._under_way.values()
        release()
        scheduler._loading._under_way[load.serial] = (load, lambda: None)
        tables = {one.state_table} if lost == "state" else {0}
        found = [record for record in load.records if record.table in tables]
        with closing(open_store(url)) as store:
            store.delete([record_key(found[-1].key, 256 * found[-1].table)])

    scheduler.plan_load = lose
    assert ends_of(one)[0] == 0
    assert len(asked) == 1
    scheduler.plan_load = plan_load
    assert ends_of(one) == (288, set())


@pytest.mark.parametrize("tokens_less", [BLOCK, BLOCK // 2])
def test_a_load_without_a_page_for_the_state_fails(engine, tokens_less):
    """As if vLLM took less of a hit than it was told of."""
    one = engine("small states", {"state_tokens": 64})
    assert ends_of(one) == (0, {64, 128, 192, 256, 288})
    scheduler = one.scheduler.connector._scheduler
    del scheduler._leave_out  # it is right here
    plan_load = scheduler.plan_load

    def less(request: Any, tables: Any, tokens: int) -> None:
        plan_load(request, tables, tokens - tokens_less)

    scheduler.plan_load = less
    assert ends_of(one)[0] == 0
    assert one.failed_loads == 1


def states_saved(one: Engine) -> set[int]:
    return {one.ends[key[:32]] for key in one.saved if int.from_bytes(key[32:34], "little") // 256 == one.state_table}


@pytest.mark.parametrize("ahead", [False, True], ids=["one step at a time", "a step ahead"])
def test_a_session_whose_part_ends_at_a_stop_token_leaves_no_wrong_state(engine, ahead):
    """A step ahead, the stop token has gone through the running state when it is seen, and the next part goes on from
    that: vLLM's own mistake, which no other request may load."""
    one = engine("small states", ahead=ahead)
    one.stops_at = 60
    session = one.add("session", PARTS[:50], 100, resumable=True)
    first = None
    for part in ([*PARTS[100:200]], None):
        for _ in range(60):
            if "STREAMING" in str(session.status):
                break
            one.step()
        one.tell_all()
        if part is None:
            break
        first = states_saved(one)
        one.stops_at = 160
        if ahead:
            one.compute = lambda *_: None  # it would find the wrong state
        one.add("session", part, 100, resumable=True)
    assert first == {32}
    assert (states_saved(one) == {32}) == ahead


def test_a_state_is_saved_where_no_record_is(engine, url):
    """Its KV was handed over before."""
    one = engine("small states")
    ends_of(one, 256)
    lost = {key for key in one.saved if int.from_bytes(key[32:34], "little") // 256 == one.state_table}
    saving = one.scheduler.connector._scheduler._saving
    plan = saving.plan

    def save_states_only(ours: Any, scheduled: int, step: Any) -> Any:
        tracker = ours.identified()
        tracker.stored_tokens = max(tracker.stored_tokens, 256)
        return plan(ours, scheduled, step)

    saving.plan = save_states_only
    with closing(open_store(url)) as store:
        store.delete(sorted(lost))
    one.saved -= lost
    assert ends_of(one, 256) == (0, {224, 256})


def test_a_prefill_engine_promises_the_state_that_a_hit_needs(engine, url):
    """With the last whole block in vLLM's own cache its state is not made again."""
    one = engine("small states", {"chunk_tokens": 32})
    promises = []
    connector = one.scheduler.connector._scheduler
    promise = connector.promise
    connector.promise = lambda request: promises.append(promise(request)) or promises[-1]
    params = {"kv_transfer_params": {"do_remote_decode": True}}
    for i in range(2):
        one.add(f"{i}", PARTS[:256], 1, **params)
        one.run()
        with closing(open_store(url)) as store:
            states = [key for key in one.saved if int.from_bytes(key[32:34], "little") // 256 == one.state_table]
            assert store.contains([key for key in states if one.ends[key[:32]] == 224]) == [i == 0]
            store.delete([key for key in states if one.ends[key[:32]] == 224])
    assert promises == [{"lmcache_mm": {"wait": True}}, None]


def test_drafts_are_refused_whatever_pages_say(cases):
    options = importlib.import_module("lmcache_mm.vllm.options")
    config = cases.config_of("BLHNC")
    caches = cases.kv_cache_config_of("small states", "BLHNC")
    (plain,) = {group.kv_dtype for group in options.groups_of(config, caches) if group.states}
    config.mamba_config.enable_stochastic_rounding = True
    (rounded,) = {group.kv_dtype for group in options.groups_of(config, caches) if group.states}
    assert plain != rounded
    config.speculative_config = SimpleNamespace(method="mtp", num_speculative_tokens=3)
    with pytest.raises(ValueError, match="speculative decoding is not supported with layers that keep a state"):
        options.groups_of(config, caches)
