"""Our scheduler beside vLLM's own, over the same requests: whatever it leaves out, nothing else may change.

No model runs here. Both schedulers are real, and get the same made-up tokens.
"""

import collections
import logging

import pytest

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def runs():
    """`scheduler_runs`; tests are collected without vLLM too."""
    import scheduler_runs

    return scheduler_runs


@pytest.mark.parametrize("kind", ["async", "sync"])
@pytest.mark.parametrize("case", ["room", "preemption", "reset", "abort", "pause", "stages"])
def test_everything_but_the_handing_over_is_as_in_vllm(models, runs, kind, case):
    folder = models["qwen2-tied"]
    options = {
        "room": dict(num_blocks=1000),
        "preemption": dict(num_blocks=30),  # one request alone may need 19
        "reset": dict(num_blocks=1000, events={40: runs.reset, 41: runs.reset, 90: runs.reset}),
        "abort": dict(num_blocks=1000, events={30: runs.abort, 60: runs.abort}),
        # Every sequence is at a block's end in one step of 16, and what was cached then shows at once.
        "pause": dict(
            num_blocks=1000, pauses=range(20, 150, 3), events=dict.fromkeys(range(20, 150, 9), runs.reset)
        ),
        "stages": dict(num_blocks=1000, depth=3),
    }[case]
    requests = runs.make_requests(40)
    steps, received, num_outputs = runs.run(runs.OURS[kind], folder, requests, **options)
    their_steps, their_received, their_num_outputs = runs.run(
        runs.THEIRS[kind], folder, runs.make_requests(40), **options
    )
    assert steps == their_steps
    if case in ("preemption", "reset"):
        assert sum(request.num_preemptions for request in requests) > 5
    if case == "abort":  # of requests that were aborted nobody gets to see what was kept back
        ended = {request_id for request_id, (_, _, reason) in received.items() if reason is not None}
        assert len(ended) == 34
        received = {request_id: received[request_id] for request_id in ended}
        their_received = {request_id: their_received[request_id] for request_id in ended}
    assert received == their_received
    if case != "stages":
        assert 4 * num_outputs < their_num_outputs
    lengths = {len(tokens) for tokens, _, _ in received.values()}
    assert {1, 2, 15, 16, 17, 70} <= lengths  # completions that ended at their limit
    assert any(tokens[-1] == runs.STOP and len(tokens) > 64 for tokens, _, _ in received.values())


def test_most_tokens_take_the_shortcuts(models, runs, monkeypatch):
    """All but the first and the last token of a completion are idle; one place in 16 needs a new block."""
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    calls = collections.Counter()

    def counted(cls, name):
        function = getattr(cls, name)

        def count(*args, **options):
            calls[cls.__name__, name] += 1
            return function(*args, **options)

        monkeypatch.setattr(cls, name, count)

    counted(runs.AsyncRunScheduler, "_take")
    counted(KVCacheManager, "allocate_slots")
    _, received, _ = runs.run(
        runs.AsyncRunScheduler, models["qwen2-tied"], runs.make_requests(40), num_blocks=1000
    )
    allocations = calls.pop(("KVCacheManager", "allocate_slots"))
    runs.run(runs.AsyncScheduler, models["qwen2-tied"], runs.make_requests(40), num_blocks=1000)
    num_idle = sum(max(0, len(tokens) - 2) for tokens, _, _ in received.values())
    assert calls["AsyncRunScheduler", "_take"] == num_idle
    # One for each block that a completion begins, and some for the prompts, which are read in parts.
    assert allocations < calls["KVCacheManager", "allocate_slots"] / 10


def test_requests_that_are_read_as_they_come_get_every_token_at_once(models, runs):
    def mixed():
        return [*runs.make_requests(8), *runs.make_requests(8, is_rollout=False)]

    runs.Recording.outputs.clear()
    _, received, _ = runs.run(runs.Recording, models["qwen2-tied"], mixed(), num_blocks=1000)
    _, expected, _ = runs.run(runs.THEIRS["async"], models["qwen2-tied"], mixed(), num_blocks=1000)
    assert received == expected
    lengths = [len(tokens) for request_id, (tokens, _, _) in received.items() if request_id.endswith("chat")]
    assert len(lengths) == 8
    handed = [output for outputs in runs.Recording.outputs for output in outputs]
    assert [n for request_id, n, _ in handed if request_id.endswith("chat")] == [1] * sum(lengths)


def test_rollouts_are_handed_over_in_runs_that_end_at_different_steps(models, runs):
    from grpo_jax.rollout.vllm.scheduler import RUN

    runs.Recording.outputs.clear()
    _, received, _ = runs.run(runs.Recording, models["qwen2-tied"], runs.make_requests(40), num_blocks=1000)
    by_request = collections.defaultdict(list)
    for request_id, num_tokens, is_over in (o for outputs in runs.Recording.outputs for o in outputs):
        by_request[request_id].append((num_tokens, is_over))
    assert by_request.keys() == received.keys()
    for parts in by_request.values():
        assert [is_over for _, is_over in parts] == [False] * (len(parts) - 1) + [True]
        assert all(num_tokens <= RUN for num_tokens, _ in parts)
        assert all(num_tokens == RUN for num_tokens, _ in parts[1:-1])
    unfinished = [sum(not is_over for *_, is_over in outputs) for outputs in runs.Recording.outputs]
    assert sum(unfinished) > 10 and max(unfinished) <= 2


@pytest.mark.parametrize("kind", ["async", "sync"])
def test_a_pause_is_over_when_all_tokens_are_handed_over(models, runs, kind):
    """vLLM counts a token among the weights of the moment at which it is handed over."""
    from vllm.v1.core.sched.interface import PauseState

    def paused_midway(cls):
        """What each request was handed before the pause ended, and in all; and the empty steps of the pause."""
        scheduler = runs.scheduler_for(cls, models["qwen2-tied"])
        for request in runs.make_requests(20):
            scheduler.add_request(request)
        received = runs.step_all(scheduler, num_steps=60)
        scheduler.set_pause_state(PauseState.PAUSED_ALL)
        num_empty = 0
        while scheduler.has_requests():
            num_empty += 1
            runs.step_empty(scheduler, received)
        before = {request_id: list(tokens) for request_id, tokens in received.items()}
        scheduler.set_pause_state(PauseState.UNPAUSED)
        runs.step_all(scheduler, received=received)
        return before, received, num_empty

    before, received, num_empty = paused_midway(runs.OURS[kind])
    their_before, their_received, their_num_empty = paused_midway(runs.THEIRS[kind])
    assert before == their_before and received == their_received
    assert num_empty == max(1, their_num_empty)
    assert len(before) > 10 and before != received


@pytest.mark.parametrize(("is_asynchronous", "kind"), [(True, "async"), (False, "sync")])
def test_ours_is_used_with_this_vllm(runs, is_asynchronous, kind):
    import vllm

    from grpo_jax.rollout.vllm.scheduler_choice import choose_scheduler

    # Written down by name and switched off, as a user may.
    off = {
        "return_sampling_mask": False,
        "kv_transfer_config": None,
        "per_request_spec_decode_metrics": "none",
    }
    name, why = choose_scheduler(off, vllm.__version__, is_asynchronous=is_asynchronous)
    assert (name, why) == (f"grpo_jax.rollout.vllm.scheduler.{runs.OURS[kind].__name__}", "")


def allocate_with_another_order(self, num_new_tokens, request, num_lookahead_tokens=0): ...
def allocate_with_one_more(self, request, num_new_tokens, group, num_lookahead_tokens=0): ...
def allocate_without_lookahead(self, request, num_new_tokens, **options): ...
def cache_with_another_name(self, request, num_tokens): ...


@pytest.mark.parametrize(
    ("method", "changed"),
    [
        ("allocate_slots", allocate_with_another_order),
        ("allocate_slots", allocate_with_one_more),
        ("allocate_slots", allocate_without_lookahead),
        ("cache_blocks", cache_with_another_name),
    ],
)
def test_a_vllm_that_has_changed_has_its_own(runs, monkeypatch, method, changed):
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    from grpo_jax.rollout.vllm.scheduler_choice import choose_scheduler

    monkeypatch.setattr(KVCacheManager, method, changed)
    name, why = choose_scheduler({}, "0.32.0", is_asynchronous=True)
    assert name is None
    assert why == f"vLLM 0.32.0 has changed {changed.__qualname__}, which ours relies on"


def test_an_engine_that_is_asked_for_more_has_vllms_own(models, caplog):
    import vllm_helpers as helpers

    from grpo_jax.rollout.base import SamplingParams

    folder, mesh = models["qwen2-tied"], helpers.mesh_of()
    _, params = helpers.load(folder, mesh)
    events = "kv_events_config={'enable_kv_cache_events': True, 'publisher': 'null'}"
    with caplog.at_level(logging.WARNING):
        engine = helpers.engine_for(folder, mesh, engine_args=(events,))
        try:
            engine.load_weights(params, version=0)
            groups = engine.generate(helpers.prompts([3, 5]), SamplingParams(2, 1.0, 150), seed=0)
        finally:
            engine.close()
    [line] = [r.getMessage() for r in caplog.records if "scheduler" in r.getMessage()]
    assert line.startswith(
        "vLLM's own scheduler is used: ours would lose what kv_events_config asks for. It takes two to three"
    )
    difference = helpers.worst_difference(groups, helpers.reference(folder))
    assert difference < helpers.TOLERANCE
