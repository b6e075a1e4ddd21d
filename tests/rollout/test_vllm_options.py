"""vLLM's engine arguments that follow from the configuration."""

import itertools

import jax.numpy as jnp
import pytest

from grpo_jax.model.hf import ModelFolder
from grpo_jax.model.rope import RopeScaling
from grpo_jax.model.transformer import ModelConfig
from grpo_jax.rollout.vllm.options import engine_options, graph_sizes


@pytest.fixture
def options(rollout_section, tmp_path):
    """Returns `options(...)`: the engine's, for a model in bfloat16 with 900 tokens at most."""
    sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1, num_kv_heads=1)
    switches = dict(rope_theta=1e4, rms_norm_eps=1e-6, tie_embeddings=True, qkv_bias=True, qk_norm=False)
    config = ModelConfig(**sizes, **switches, head_dim=8, dtype=jnp.bfloat16)
    folder = ModelFolder(tmp_path, config, {}, "F32", (), max_position=900)

    def options(max_model_len=900, rope_scaling=None, adapter_rank=0, **changes):
        model = folder.with_config(rope_scaling=rope_scaling)
        section = rollout_section(**changes)
        return engine_options(section, model, max_model_len, adapter_rank=adapter_rank)

    return options


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


@pytest.mark.parametrize(("rank", "room"), [(1, 8), (8, 8), (20, 32), (257, 320), (512, 512)])
def test_an_engine_has_room_for_the_adapters_of_all_that_is_under_way(options, rank, room):
    """Of the batch that is trained on, of one ahead, and of the next version."""
    got = options(adapter_rank=rank, max_lag=1)
    assert (got["enable_lora"], got["max_loras"], got["max_cpu_loras"]) == (True, 3, 3)
    assert got["max_lora_rank"] == room
    assert "enable_lora" not in options()


def test_a_step_of_the_engine_can_read_the_longest_sequence(options):
    assert options()["max_num_batched_tokens"] == 8192
    assert options(max_model_len=10_000)["max_num_batched_tokens"] == 10_000
    assert options(max_num_seqs=9_000)["max_num_batched_tokens"] == 9_000  # vLLM wants one for each sequence
    assert options(engine_args=("max_num_batched_tokens=16",))["max_num_batched_tokens"] == 16


def test_positions_that_the_model_was_not_made_for_get_a_rope_table(options):
    assert "hf_overrides" not in options(max_model_len=900)
    assert options(max_model_len=901)["hf_overrides"] == {"max_position_embeddings": 901}
    # It stays beside overrides of the user's own.
    own = "hf_overrides={'head_dtype': 'float32'}"
    both = {"max_position_embeddings": 901, "head_dtype": "float32"}
    assert options(max_model_len=901, engine_args=(own,))["hf_overrides"] == both


def test_vllm_is_told_of_a_window_that_it_would_take_for_another(options):
    """YaRN's window is the scaled one. Dynamic RoPE within its window is RoPE, and not vLLM's rule."""
    assert "hf_overrides" not in options(rope_scaling=RopeScaling("linear", 4.0))
    assert options(rope_scaling=RopeScaling("yarn", 4.0))["hf_overrides"] == {"max_position_embeddings": 900}
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    assert options(rope_scaling=RopeScaling("dynamic", 4.0))["hf_overrides"] == plain


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
