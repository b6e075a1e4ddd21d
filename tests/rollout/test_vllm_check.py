"""What is said of a vLLM that cannot be used, or that did not start. No vLLM and no Ray take part."""

import itertools
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from grpo_jax.config import ConfigError
from grpo_jax.model.config import ModelConfig
from grpo_jax.model.hf import ModelFolder
from grpo_jax.rollout.vllm import check as vllm_check
from grpo_jax.rollout.vllm import cluster as ray_cluster
from grpo_jax.rollout.vllm.check import TESTED, VllmInstallation, find_vllm
from grpo_jax.rollout.vllm.engine import engine_options, graph_sizes

OURS = {"vllm": None, "is_cpu": False, "ray": "2.60.0", "python": "3.11.7"}


def refusal(section):
    """The error that `find_vllm` refuses a section with; one line, with key and value."""
    with pytest.raises(ConfigError) as caught:
        find_vllm(section)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"{caught.value.key}=")
    return caught.value


@pytest.fixture
def other_python(monkeypatch):
    """Returns `other_python(...)`: an environment /opt/other that has been found to hold so much."""

    def make(**found):
        answers = {sys.executable: OURS, "/opt/other/bin/python": OURS | {"vllm": "0.32.0"} | found}
        monkeypatch.setattr(vllm_check, "_ask", answers.__getitem__)
        return "/opt/other/bin/python"

    return make


# Interpreters


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """The interpreter of a new environment with nothing in it."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=60)
    return str(folder / "bin" / "python")


def test_an_environment_without_vllm(rollout_section, bare_python, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    error = refusal(rollout_section(python=bare_python))
    assert (error.key, error.value) == ("rollout.python", bare_python)
    assert f"vLLM is not installed in the environment of {bare_python}" in error.rule
    assert "--config.rollout.engine=local" in error.rule


def test_the_trainers_own_environment_without_vllm(rollout_section, monkeypatch):
    monkeypatch.setattr(vllm_check, "_ask", {sys.executable: OURS}.__getitem__)
    error = refusal(rollout_section())
    assert (error.key, error.value) == ("rollout.engine", "vllm")
    assert "in this environment" in error.rule and "rollout.python" in error.rule


def test_an_interpreter_that_is_not_there(rollout_section, tmp_path):
    path = str(tmp_path / "bin" / "python")
    error = refusal(rollout_section(python=path))
    assert (error.key, error.value) == ("rollout.python", path)
    assert "no such file" in error.rule
    assert (
        "no such file" in refusal(rollout_section(python=str(tmp_path))).rule
    )  # the folder of an environment


def test_a_program_that_is_no_interpreter(rollout_section, tmp_path):
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\necho 'first line' >&2\necho 'I am no snake' >&2\nexit 3\n")
    program.chmod(0o755)
    error = refusal(rollout_section(python=str(program)))
    assert (error.key, error.value) == ("rollout.python", str(program))
    assert error.rule == "does not run as a Python interpreter: I am no snake"


def test_a_program_that_fails_without_a_word(rollout_section):
    assert refusal(rollout_section(python="/bin/false")).rule.endswith("interpreter: no output")


@pytest.mark.parametrize("mode", [0o644, 0o755], ids=["not executable", "no program"])
def test_a_file_that_is_no_program(rollout_section, tmp_path, mode):
    file = tmp_path / "python"
    file.write_text("home = /usr/bin\n")
    file.chmod(mode)
    assert "does not run as a Python interpreter" in refusal(rollout_section(python=str(file))).rule


@pytest.mark.parametrize("program", ["/bin/true", "/bin/echo"])
def test_a_program_that_does_something_else(rollout_section, program):
    assert "does not run as a Python interpreter" in refusal(rollout_section(python=program)).rule


def test_the_trainers_python_path_is_not_the_engines(rollout_section, bare_python, tmp_path, monkeypatch):
    """The engine's processes get PYTHONPATH with this package alone (`Cluster._runtime_env`)."""
    metadata = tmp_path / "vllm-0.32.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    vllm_check._ask.cache_clear()
    try:
        assert "vLLM is not installed in" in refusal(rollout_section(python=bare_python)).rule
    finally:
        vllm_check._ask.cache_clear()


def test_another_environment_of_the_same_python_is_another(rollout_section, bare_python):
    """Both environments' interpreters are links to the one that they were made with."""
    assert not vllm_check.python_is_ours(rollout_section(python=bare_python))


def test_the_trainers_own_interpreter_is_its_own(rollout_section):
    assert vllm_check.python_is_ours(rollout_section(python=""))
    assert vllm_check.python_is_ours(rollout_section(python=sys.executable))


# Versions


def test_versions_that_fit(rollout_section, other_python, caplog):
    for version in TESTED:
        found = find_vllm(rollout_section(python=other_python(vllm=version)))
        assert found == VllmInstallation(version, is_cpu=False)
    assert not caplog.records


@pytest.mark.parametrize("found", [{"vllm": f"{TESTED[0]}+cpu"}, {"vllm": TESTED[0], "is_cpu": True}])
def test_a_build_for_cpus_is_known_by_version_or_by_name(rollout_section, other_python, caplog, found):
    assert find_vllm(rollout_section(python=other_python(**found))) == VllmInstallation(
        found["vllm"], is_cpu=True
    )
    assert not caplog.records  # the tested version, whatever follows the +


@pytest.mark.parametrize("version", ["0.24.3", "0.9.2", "0.8.5.post1", "0.24.0rc1"])
def test_a_version_that_is_too_old(rollout_section, other_python, version):
    error = refusal(rollout_section(python=other_python(vllm=version)))
    assert error.key == "rollout.python"
    assert f"vLLM {version} is too old: at least 0.25 is needed" in error.rule


@pytest.mark.parametrize("version", ["0.25.0", "0.100.2", "1.0.0", "0.33.0rc2.dev5+g1234567"])
def test_a_version_that_nobody_tested_is_warned_of(rollout_section, other_python, caplog, version):
    with caplog.at_level(logging.WARNING):
        assert find_vllm(rollout_section(python=other_python(vllm=version))).version == version
    [record] = caplog.records
    assert f"vLLM {version} was not tested" in record.getMessage()
    assert all(tested in record.getMessage() for tested in TESTED)


@pytest.mark.parametrize(
    "found", [{"ray": "2.61.0"}, {"ray": None}, {"python": "3.12.7"}, {"python": "3.1.7"}], ids=str
)
def test_ray_needs_the_same_of_both_ends(rollout_section, other_python, found):
    error = refusal(rollout_section(python=other_python(**found)))
    theirs = OURS | found
    assert f"has Ray {theirs['ray']} and Python {theirs['python']}, the trainer Ray 2.60.0" in error.rule


def test_another_patch_release_of_python_will_do(rollout_section, other_python):
    find_vllm(rollout_section(python=other_python(python="3.11.13")))


# Port


def test_a_port_in_use(rollout_section, other_python):
    python = other_python()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        error = refusal(rollout_section(python=python, api_port=port))
    assert (error.key, error.value) == ("rollout.api_port", port)
    assert "choose another port" in error.rule
    find_vllm(rollout_section(python=python, api_port=port))  # free again


# GPUs


@pytest.fixture
def split_gpus():
    ray_cluster.split_gpus.cache_clear()
    yield ray_cluster.split_gpus
    ray_cluster.split_gpus.cache_clear()


def separate(section, **changes):
    return section(placement="separate", **changes)


@pytest.mark.parametrize(
    ("visible", "changes", "trainer", "engines"),
    [
        ("0,1,2,3", {}, "012", "3"),
        ("0,1,2,3", {"num_replicas": 2}, "01", "23"),
        ("7,5,3,1", {"tensor_parallel_size": 2}, "75", "31"),
        ("0,1,2,3,4", {"num_replicas": 2, "tensor_parallel_size": 2}, "0", "1234"),
    ],
)
def test_the_last_gpus_are_the_engines(
    rollout_section, split_gpus, monkeypatch, visible, changes, trainer, engines
):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert split_gpus(separate(rollout_section, **changes)) == (tuple(trainer), tuple(engines))


def test_gpus_are_split_once(rollout_section, split_gpus, monkeypatch):
    """The trainer then sees its own alone, and would give away one of those."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    section = separate(rollout_section)
    assert split_gpus(section) == (("0", "1"), ("2",))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert split_gpus(separate(rollout_section)) == (("0", "1"), ("2",))


@pytest.mark.parametrize("changes", [{"num_replicas": 2}, {"tensor_parallel_size": 2}, {"num_replicas": 3}])
def test_the_trainer_needs_a_gpu_too(rollout_section, split_gpus, monkeypatch, changes):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(ConfigError, match=r"rollout\.placement='separate'.*leave none of 2 for the trainer"):
        split_gpus(separate(rollout_section, **changes))


def test_while_ray_starts_it_sees_the_engines_gpus(rollout_section, split_gpus, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    with ray_cluster._visible_gpus(separate(rollout_section)):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "2"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1,2"
    for section in (rollout_section(placement="colocated"), None):
        with ray_cluster._visible_gpus(section):
            assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1,2"


# Causes

TRACEBACK = """ray::EngineActor.start() (pid=123, ip=10.0.0.1)
  File "vllm/v1/engine/core.py", line 99, in start
ValueError: the model's head size 20 is not supported
During handling of the above exception, another exception occurred:
vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue.
ray.exceptions.RayTaskError: see the log
RuntimeError: Engine core initialization failed. See root cause above.
"""


def test_the_telling_line_of_a_traceback():
    cause, log = ray_cluster.root_cause(RuntimeError(TRACEBACK), 0)
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
    is_ray = lambda path: str(path).startswith("/tmp/ray/")
    monkeypatch.setattr(ray_cluster, "Path", lambda path: tmp_path if is_ray(path) else Path(path))
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


# Options


@pytest.fixture
def options(rollout_section, tmp_path):
    """Returns `options(...)`: the engine's, for a model in bfloat16 with 900 tokens at most."""
    sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1, num_kv_heads=1)
    switches = dict(rope_theta=1e4, rms_norm_eps=1e-6, tie_embeddings=True, qkv_bias=True, qk_norm=False)
    config = ModelConfig(**sizes, **switches, head_dim=8, dtype=jnp.bfloat16)
    folder = ModelFolder(tmp_path, config, {}, "F32", ())
    return lambda max_model_len=900, **changes: engine_options(
        rollout_section(**changes), folder, max_model_len
    )


def test_options_follow_from_the_configuration(options, tmp_path):
    got = options(
        max_num_seqs=17,
        tensor_parallel_size=2,
        gpu_memory_utilization=0.3,
        enforce_eager=True,
        sleep=True,
    )
    expected = {
        "model": str(tmp_path),
        "dtype": "bfloat16",
        "max_model_len": 900,
        "max_num_seqs": 17,
        "tensor_parallel_size": 2,
        "gpu_memory_utilization": 0.3,
        "enforce_eager": True,
        "enable_sleep_mode": True,
        "max_num_batched_tokens": 8192,
    }
    assert expected.items() <= got.items()


def test_a_step_of_the_engine_can_read_the_longest_sequence(options):
    assert options()["max_num_batched_tokens"] == 8192
    assert options(max_model_len=10_000)["max_num_batched_tokens"] == 10_000
    assert options(max_num_seqs=9_000)["max_num_batched_tokens"] == 9_000  # vLLM wants one for each sequence
    assert options(engine_args=("max_num_batched_tokens=16",))["max_num_batched_tokens"] == 16


@pytest.mark.parametrize(
    ("max_num_seqs", "sizes"),
    [
        (1, [1, 2]),
        (3, [1, 2, 3, 4, 6]),
        (8, [1, 2, 4, 8, 16]),
        (32, [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64]),
        (50, [1, 2, 4, 8, 16, 24, 32, 40, 48, 50, 56, 64, 80, 96, 100]),
    ],
)
def test_cuda_graphs_are_captured_for_all_sequences_and_as_far_as_vllm_goes(options, max_num_seqs, sizes):
    assert options(max_num_seqs=max_num_seqs)["cudagraph_capture_sizes"] == sizes
    assert options(engine_args=(f"max_num_seqs={max_num_seqs}",))["cudagraph_capture_sizes"] == sizes


@pytest.mark.parametrize(
    "changes",
    [
        {"enforce_eager": True},
        {"engine_args": ("enforce_eager=True",)},
        {"engine_args": ("max_cudagraph_capture_size=64",)},
        {"engine_args": ("compilation_config={'cudagraph_capture_sizes': [1]}",)},
        {"engine_args": ("speculative_config={'method': 'ngram'}",)},
    ],
)
def test_cuda_graphs_are_left_to_vllm_where_an_argument_is_about_them(options, changes):
    assert "cudagraph_capture_sizes" not in options(**changes)


def test_padding_to_a_cuda_graph_is_small_where_a_step_is_long():
    sizes = graph_sizes(1024)
    assert sizes[-1] == 1024 and len(sizes) < 40
    gaps = {low: high - low for low, high in itertools.pairwise(sizes)}
    assert all(gap <= max(8, low / 4) for low, gap in gaps.items())
    assert all(gap <= low / 8 for low, gap in gaps.items() if low >= 256)


@pytest.mark.parametrize(
    ("argument", "name", "value"),
    [
        ("max_num_batched_tokens=16384", "max_num_batched_tokens", 16384),
        ("swap_space=0.5", "swap_space", 0.5),
        ("enable_prefix_caching=False", "enable_prefix_caching", False),
        ("revision=None", "revision", None),
        ("quantization=fp8", "quantization", "fp8"),
        ("quantization='fp8'", "quantization", "fp8"),
        ("tokenizer=/models/a-b/c.d", "tokenizer", "/models/a-b/c.d"),
        ("compilation_config={'level': 3, 'mode': None}", "compilation_config", {"level": 3, "mode": None}),
        ("hf_overrides={'a=b': [1]}", "hf_overrides", {"a=b": [1]}),  # the first = divides
        ("served_model_name=", "served_model_name", ""),
        ("served_model_name=1.2.3", "served_model_name", "1.2.3"),
    ],
)
def test_engine_arguments_are_literals_or_bare_words(options, argument, name, value):
    got = options(engine_args=(argument,))[name]
    assert got == value and type(got) is type(value)


def test_what_only_looks_like_a_literal_is_a_word(options):
    assert options(engine_args=("hf_overrides={[]: 1}",))["hf_overrides"] == "{[]: 1}"


def test_engine_arguments_have_the_last_word(options):
    got = options(max_num_seqs=17, engine_args=("max_num_seqs=3", "dtype=float32", "seed=1", "seed=2"))
    assert (got["max_num_seqs"], got["dtype"], got["seed"]) == (3, "float32", 2)
    assert options(max_num_seqs=17)["max_num_seqs"] == 17


# How many engines


def mesh_of_size(size):
    from grpo_jax.config import MeshSection
    from grpo_jax.model.sharding import make_mesh

    return make_mesh(MeshSection(1, size, 1), jax.devices()[:size])


@pytest.mark.parametrize(
    ("changes", "share_gpus", "expected"),
    [
        ({}, True, 8),  # one on each GPU
        ({"tensor_parallel_size": 2}, True, 4),
        ({"num_replicas": 3}, True, 3),
        ({}, False, 1),  # no GPUs to share
        ({"num_replicas": 3}, False, 3),
        ({"placement": "separate"}, True, 1),
        ({"placement": "separate", "num_replicas": 2}, True, 2),
    ],
)
def test_the_number_of_engines(rollout_section, changes, share_gpus, expected):
    from grpo_jax.rollout.vllm.engine import num_replicas

    assert num_replicas(rollout_section(**changes), mesh_of_size(8), share_gpus=share_gpus) == expected


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"num_replicas": 5, "tensor_parallel_size": 2}, "rollout.num_replicas"),
        ({"tensor_parallel_size": 16}, "rollout.tensor_parallel_size"),
    ],
)
def test_more_engines_than_gpus_are_refused(rollout_section, changes, key):
    from grpo_jax.rollout.vllm.engine import num_replicas

    with pytest.raises(ConfigError, match="the trainer has 8") as caught:
        num_replicas(rollout_section(**changes), mesh_of_size(8), share_gpus=True)
    assert caught.value.key == key


def test_a_ray_cluster_that_does_not_answer_is_refused(rollout_section):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound, and not listening: connections are refused
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        with pytest.raises(ConfigError, match="no Ray cluster answers") as caught:
            vllm_check.check_ray_address(address)
    assert (caught.value.key, caught.value.value) == ("rollout.ray_address", address)
    vllm_check.check_ray_address("")
    vllm_check.check_ray_address("auto")
