"""What is said of a vLLM that did not start, or that failed: one line. No vLLM and no Ray take part."""

import pytest

from grpo_jax.rollout.vllm import cluster as ray_cluster

TRACEBACK = """ray::EngineActor.start() (pid=123, ip=10.0.0.1)
  File "vllm/v1/engine/core.py", line 99, in start
ValueError: the model's head size 20 is not supported
During handling of the above exception, another exception occurred:
vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue.
ray.exceptions.RayTaskError: see the log
RuntimeError: Engine core initialization failed. See root cause above.
"""


def test_the_telling_line_of_a_traceback():
    cause, log = ray_cluster.root_cause(RuntimeError(TRACEBACK))
    assert cause == "ValueError: the model's head size 20 is not supported"
    assert "Ray worker" in log


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("KeyError: 'a'\nValueError: b", "ValueError: b"),  # the last one: the first led to it
        (
            "(EngineCore pid=7) ERROR 10-10 torch.OutOfMemoryError: CUDA out of memory.",
            "torch.OutOfMemoryError: CUDA out of memory.",
        ),
        (
            "RuntimeError: See root cause above.",
            "RuntimeError: See root cause above.",
        ),  # there is no better one
        ("The actor died.\nThe node has run out of disk.\n\n", "The node has run out of disk."),
    ],
)
def test_the_telling_line(text, cause):
    assert ray_cluster.root_cause(RuntimeError(text), 0)[0] == cause


def test_an_error_without_words_has_its_name():
    assert ray_cluster.root_cause(TimeoutError(), 0)[0] == "TimeoutError"


def test_long_causes_are_cut():
    assert len(ray_cluster.root_cause(RuntimeError("ValueError: " + "x" * 10_000), 0)[0]) == 400


@pytest.fixture
def log_folder(tmp_path, monkeypatch):
    """Stands where Ray writes its logs."""
    monkeypatch.setattr(ray_cluster, "_session_logs", lambda: tmp_path)
    return tmp_path


def test_the_log_of_the_process_tells_what_the_error_does_not(log_folder):
    log = log_folder / "worker-ab12-0100-77.err"
    log.write_text("INFO starting\nValueError: no such quantization\nINFO ending\n")
    (log_folder / "worker-ab12-0100-778.err").write_text("KeyError: of another process\n")
    error = RuntimeError("RuntimeError: Engine core initialization failed. See root cause above.")
    assert ray_cluster.root_cause(error, 77) == ("ValueError: no such quantization", str(log))


def test_the_log_that_is_named_is_the_one_that_tells(log_folder):
    """vLLM writes to stderr; Ray keeps both."""
    log = log_folder / "worker-ab12-0100-77.err"
    log.write_text("ValueError: no such quantization\n")
    (log_folder / "worker-ab12-0100-77.out").write_text("all is well\n")
    error = RuntimeError("RuntimeError: Engine core initialization failed. See root cause above.")
    assert ray_cluster.root_cause(error, 77) == ("ValueError: no such quantization", str(log))


STARTS = [  # what vLLM writes, what is to be done
    (
        "ValueError: Free memory on device (20.1/79.2 GiB) on startup is less than desired GPU memory "
        "utilization (0.9, 71.3 GiB).",
        "lower rollout.gpu_memory_utilization",
    ),
    (
        "ValueError: No available memory for the cache blocks. Try increasing it.",
        "raise rollout.gpu_memory_util",
    ),
    (
        "ValueError: To serve at least one request with max seq len (8192), 2.0 GiB KV cache is needed, which is "
        "larger than the available KV cache memory (1.1 GiB).",
        "shorten data.max_*_length",
    ),
    ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1 GiB.", "rollout.max_num_seqs"),
    ("RuntimeError: CUDA error: no kernel image is available for execution", "rollout.engine=local"),
    ("OSError: [Errno 98] Address already in use", "rollout.api_port"),
    ("TypeError: EngineArgs.__init__() got an unexpected keyword argument 'foo'", "rollout.engine_args"),
    ("ModuleNotFoundError: No module named 'flashinfer'", "rollout.python"),
    (
        "ImportError: /env/vllm/_C.abi3.so: undefined symbol: _ZN5torch3jit17parseSchemaOrNameERKSsb",
        "in the engine's environment, pip install --force-reinstall 'vllm==0.25.1'",
    ),
    pytest.param(
        # `EngineActor.start` sets this one itself, before **options.
        "TypeError: AsyncEngineArgs() got multiple values for keyword argument 'load_format'",
        "rollout.engine_args",
    ),
]


@pytest.mark.parametrize(("text", "remedy"), STARTS, ids=lambda value: value[:30])
def test_a_failed_start_comes_with_a_remedy(text, remedy):
    message = ray_cluster.explain_start(RuntimeError(f"Traceback:\n  File ...\n{text}\n"), 0)
    assert message.startswith(f"vLLM did not start: {text}; ") and remedy in message
    assert "\n" not in message


def test_a_remedy_is_found_by_what_the_log_says(log_folder):
    (log_folder / "worker-ab12-0100-77.err").write_text(
        "ValueError: No available memory for the cache blocks.\n"
    )
    message = ray_cluster.explain_start(RuntimeError("RuntimeError: See root cause above."), 77)
    assert "raise rollout.gpu_memory_utilization" in message


def test_an_unknown_cause_comes_without():
    message = ray_cluster.explain_start(RuntimeError("ValueError: what nobody knows"), 0)
    assert message.startswith("vLLM did not start: ValueError: what nobody knows (log: ")
