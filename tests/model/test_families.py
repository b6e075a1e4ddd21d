"""Every family, and every switch of one, against transformers. The rows are those of `family_models.ROWS`."""

import dataclasses
import math

import family_models
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from family_models import FAMILY_ROWS, ROWS, mesh_of, random_tokens
from safetensors.numpy import load_file
from weight_sync_helpers import unpack

from grpo_jax.config import ConfigError
from grpo_jax.learner.forward import token_scores
from grpo_jax.model.attention import attend, causal_segment_mask, within_window
from grpo_jax.model.config import parse_hf_config
from grpo_jax.model.counts import active_weights
from grpo_jax.model.grouped_product import TILES, grouped_product
from grpo_jax.model.hf import save_folder
from grpo_jax.model.logprobs import capped
from grpo_jax.model.rope import max_position
from grpo_jax.model.sharding import batch_sharding
from grpo_jax.model.transformer import forward, head_matrix, num_params
from grpo_jax.rollout import SamplingParams
from grpo_jax.rollout.local import LocalEngine
from grpo_jax.types import Prompt
from grpo_jax.weight_sync.buckets import make_push_plan, pack_buckets

LENGTHS = (47, 6, 27)
"""Of three sequences that fill a row of 80 tokens; longer and shorter than the windows of the rows."""


@pytest.fixture(scope="module", params=ROWS)
def model(request, tmp_path_factory):
    return family_models.make_model(request.param, tmp_path_factory.mktemp(request.param))


def logits(params, config, tokens, positions, segment_ids):
    hidden = forward(params, config, tokens, positions, segment_ids)
    return capped(jnp.einsum("btd,vd->btv", hidden, head_matrix(params)), config.logits_soft_cap)


def run(model, sizes, *arrays):
    """Logits of rows, on a mesh."""
    mesh = mesh_of(*sizes)
    with jax.set_mesh(mesh), jax.default_matmul_precision("highest"):
        placed = [jax.device_put(np.asarray(x, np.int32), batch_sharding(mesh)) for x in arrays]
        return np.asarray(
            jax.jit(logits, static_argnums=1)(model.params(*sizes), model.folder.config, *placed)
        )


def torch_logits(model, tokens):
    with torch.no_grad():
        return model.torch_model(torch.tensor(tokens[None])).logits[0].numpy()


def packed_row():
    """(tokens, positions, segment_ids), [1, 80] each, of sequences of `LENGTHS`."""
    tokens = random_tokens(1, sum(LENGTHS))
    positions = np.concatenate([np.arange(n) for n in LENGTHS])[None]
    return tokens, positions, np.repeat(np.arange(1, 4), LENGTHS)[None]


def test_logits_equal_transformers(model):
    tokens = random_tokens(1, 80, seed=1)
    got = run(model, (1, 1, 1), tokens, np.arange(80)[None], np.ones((1, 80)))
    want = torch_logits(model, tokens[0])
    assert np.ptp(want) > 1  # logits that differ by little would agree whatever the code
    np.testing.assert_allclose(got[0], want, rtol=0, atol=1e-4)


def test_packed_sequences_equal_single_ones(model):
    tokens, *rest = packed_row()
    got, start = run(model, (1, 1, 1), tokens, *rest)[0], 0
    for length in LENGTHS:
        want = torch_logits(model, tokens[0, start : start + length])
        np.testing.assert_allclose(got[start : start + length], want, rtol=0, atol=1e-4)
        start += length


@pytest.mark.parametrize("model", FAMILY_ROWS, indirect=True)
def test_sharded_equals_unsharded(model):
    arrays = [np.repeat(x, 4, axis=0) for x in packed_row()]
    one, eight = (run(model, sizes, *arrays) for sizes in ((1, 1, 1), (2, 2, 2)))
    # Sums in another order: float32 rounding of logits of some 10.
    np.testing.assert_allclose(eight, one, rtol=0, atol=1e-4)


def plain_kernel(q, k, v, sequences, window=0, divisor=None):
    """Stands where a device has a fused kernel."""
    mask = within_window(causal_segment_mask(sequences.segment_ids), jnp.int32(window), 0)
    return attend(q, jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2), mask, divisor)


@pytest.mark.parametrize("model", ["mistral", "qwen3-windows", "gemma3"], indirect=True)
def test_kernels_are_told_the_window_of_each_layer(model):
    """On eight devices, each of which calls the kernel for its own rows and heads."""
    arrays = [np.repeat(x, 4, axis=0) for x in packed_row()]
    plain = run(model, (1, 1, 1), *arrays)
    with_kernel = dataclasses.replace(model, folder=model.folder.with_config(attention=plain_kernel))
    np.testing.assert_allclose(run(with_kernel, (2, 2, 2), *arrays), plain, rtol=0, atol=1e-4)


@pytest.mark.parametrize("model", ["qwen3-moe", "qwen3-moe-shares"], indirect=True)
def test_grouped_experts_equal_dense_ones(model):
    """On eight devices, in the interpreter of the kernel, each with half of every expert's width."""
    arrays = [np.repeat(x, 4, axis=0) for x in packed_row()]
    every = run(model, (1, 1, 1), *arrays)
    product = lambda *inputs: grouped_product(*inputs, TILES, True)
    grouped = dataclasses.replace(model, folder=model.folder.with_config(experts=product))
    np.testing.assert_allclose(run(grouped, (2, 2, 2), *arrays), every, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("model", FAMILY_ROWS, indirect=True)
def test_gradients_do_not_depend_on_what_is_recomputed(model):
    config, params = model.folder.config, model.params(1, 1, 1)
    inputs = (*map(jnp.asarray, packed_row()), None)

    def loss(params, config):
        return jnp.sum(token_scores(params, config, inputs, temperature=1.0, chunk_columns=16)[0])

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    kept, again = (gradient(params, dataclasses.replace(config, remat=remat)) for remat in ("none", "full"))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(kept), jax.tree.leaves(again), strict=True):
        assert jnp.abs(a).max() > 0, path  # every parameter is trained
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=1e-3 * float(jnp.abs(a).max()))


@pytest.mark.parametrize(
    "model",
    [row if row in FAMILY_ROWS else pytest.param(row, marks=pytest.mark.slow) for row in ROWS],
    indirect=True,
)
def test_greedy_equals_transformers(model, tokenizer):
    check_greedy(model, tokenizer, scan=True)


@pytest.mark.slow
@pytest.mark.parametrize("model", FAMILY_ROWS, indirect=True)
def test_greedy_equals_transformers_with_unrolled_layers(model, tokenizer):
    check_greedy(model, tokenizer, scan=False)


def check_greedy(model, tokenizer, scan):
    """Prompts of several lengths in one batch, with completions that go on beyond the windows of the rows."""
    prompts = [
        Prompt(f"test/{n}", tuple(map(int, random_tokens(n, seed=n))), "", "", "test", {}) for n in (3, 14, 9)
    ]
    engine = LocalEngine(
        dataclasses.replace(model.folder.config, scan_layers=scan), mesh_of(1, 1, 1), tokenizer, (), 64
    )
    engine.load_weights(model.params(1, 1, 1), 0)
    groups = engine.generate(prompts, SamplingParams(1, 0.0, 12), seed=0)
    for prompt, group in zip(prompts, groups, strict=True):
        inputs = torch.tensor([prompt.token_ids])
        output = model.torch_model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert list(group.completions[0].token_ids) == output[0, inputs.shape[1] :].tolist()


def stored(folder):
    """Name -> (shape, bytes) of the tensors of a folder, read without this package."""
    return {name: (x.shape, x.tobytes()) for name, x in load_file(folder / "model.safetensors").items()}


def test_round_trip_is_bit_identical(model, tmp_path):
    path, config = model.folder.path, model.folder.config
    save_folder(tmp_path / "saved", model.params(1, 2, 2), config, files_from=path, dtype="F32")
    assert stored(tmp_path / "saved") == stored(path)


def test_pushes_carry_every_tensor(model):
    """A push is in the form of a folder, whatever the mesh, and every row of it is sent once."""
    plan = make_push_plan(model.folder.config, 6 * 4096)
    packed = pack_buckets(model.params(2, 2, 2), plan, mesh_of(2, 2, 2))
    sent = unpack(plan.layout, [flat for _, flat, _ in packed])
    assert sent == {
        name: value
        for name, value in stored(model.folder.path).items()
        if not (model.folder.config.tie_embeddings and name == "lm_head.weight")
    }


# config.json

RELEASED = {
    # Gemma 3 270M, 100 million beside its embedding of 168; Qwen3-30B-A3B, 30.5 billion of which 3.3 are active
    # (0.3 of these are the embedding); Phi-4, 14.7 billion.
    "gemma3": (
        "Gemma3",
        dict(vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18,
             num_attention_heads=4, num_key_value_heads=1),
        268e6,
        268e6 - 262144 * 640,
    ),
    "qwen3-moe": (
        "Qwen3Moe",
        dict(vocab_size=151936, hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, head_dim=128,
             num_key_value_heads=4, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768),
        30.5e9,
        3.3e9 - 2 * 151936 * 2048,
    ),
    "phi3": (
        "Phi3",
        dict(vocab_size=100352, hidden_size=5120, intermediate_size=17920, num_hidden_layers=40,
             num_attention_heads=40, num_key_value_heads=10),
        14.7e9,
        14.7e9 - 2 * 100352 * 5120,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("architecture", "fields", "total", "active"), RELEASED.values(), ids=RELEASED)
def test_sizes_of_released_models(architecture, fields, total, active):
    config = parse(architecture, **fields)
    assert num_params(config) == pytest.approx(total, rel=0.01)
    assert active_weights(config) == pytest.approx(active, rel=0.02)


SIZES = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=24,
    num_hidden_layers=7,
    num_attention_heads=4,
    num_key_value_heads=2,
)
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


def parse(architecture, **fields):
    return parse_hf_config({"architectures": [f"{architecture}ForCausalLM"]} | SIZES | fields)


def test_gemma3_is_read_from_either_style_of_config():
    """The style of its folders on the hub, and that which transformers 5 writes."""
    full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    new = parse(
        "Gemma3",
        layer_types=(["sliding_attention"] * 5 + ["full_attention"] * 2)[:7],
        sliding_window=512,
        rope_parameters={
            "full_attention": full,
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    )
    old = dict(sliding_window_pattern=6, rope_theta=1e6, rope_local_base_freq=1e4, sliding_window=512)
    old = parse("Gemma3", **old, rope_scaling={"rope_type": "linear", "factor": 8.0})
    # By the pattern, the sixth layer sees all and the seventh has a window again.
    assert old.windows == (512,) * 5 + (0, 512) and new.windows == (512,) * 5 + (0, 0)
    assert old.other_rope_layers == (True,) * 5 + (False, True)
    same = dict(windows=(), other_rope_layers=())
    assert dataclasses.replace(old, **same) == dataclasses.replace(new, **same)
    # What config.json leaves out there: heads of 256, tied embeddings, scores divided by the root of 256.
    assert (old.head_dim, old.tie_embeddings, old.score_divisor, old.rope_theta) == (256, True, None, 1e6)
    assert parse("Gemma3", query_pre_attn_scalar=144).score_divisor == 12


def test_longrope_ends_at_the_original_window():
    """As in Phi-4-mini, where the key stands beside the scaling; beyond it, the longest row of a batch decides."""
    hf = dict(rope_scaling=LONGROPE, original_max_position_embeddings=64, max_position_embeddings=256)
    config = parse("Phi3", **hf)
    assert config.rope_scaling.attention_factor == math.sqrt(1 + math.log(4) / math.log(64))
    assert not config.can_extrapolate and max_position(hf) == 64


def test_windows_that_no_sequence_fills_leave_fused_kernels():
    """Phi-4-mini's window of 262,144, where LongRoPE ends at 4,096. Mistral's RoPE may go beyond its window."""
    sizes = dict(sliding_window=64, max_position_embeddings=64)
    assert (
        parse("Phi3", **sizes, rope_scaling=LONGROPE | {"original_max_position_embeddings": 64}).windows == ()
    )
    assert parse("Mistral", **sizes).windows == (64,) * 7


@pytest.mark.parametrize(
    ("architecture", "fields", "words"),
    [
        ("Gemma3", dict(attn_logit_softcapping=50.0), "attn_logit_softcapping=50.0"),
        ("Gemma3", dict(final_logit_softcapping=-1), "final_logit_softcapping=-1"),
        ("Llama", dict(final_logit_softcapping=30.0), "final_logit_softcapping=30.0"),
        ("Gemma3", dict(hidden_activation="gelu"), "hidden_activation=gelu_pytorch_tanh is implemented"),
        ("Gemma3", dict(use_bidirectional_attention=True), "use_bidirectional_attention=True"),
        ("Gemma3", dict(rope_parameters={"sliding_attention": {"rope_type": "linear"}}), "rope_type=default only"),
        ("Gemma3", dict(rope_parameters={"full_attention": 3}), "full_attention=3"),
        ("Gemma3", dict(sliding_window_pattern=0), "sliding_window_pattern=0"),
        ("Llama", dict(rope_parameters={"sliding_attention": {}}), "one RoPE"),
        ("Llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
        ("Llama", dict(rope_parameters={"partial_rotary_factor": 0.5}), "rotated whole"),
        ("Mistral", dict(layer_types=["sliding_attention"] * 7), "layer_types="),
        ("Phi3", dict(partial_rotary_factor=1.5), "even number of a head's channels"),
        ("Phi3", dict(partial_rotary_factor=0.4), "even number of a head's channels"),
        ("Phi3", dict(rope_scaling=LONGROPE, max_position_embeddings=64, partial_rotary_factor=0.5),
         "numbers there must be 2"),
        ("Phi3", dict(rope_scaling={"type": "longrope"}, max_position_embeddings=64), "short_factor=None"),
        ("Phi3", dict(rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling='linear'"),
        ("Qwen3Moe", MOE | dict(decoder_sparse_step=2, mlp_only_layers=[1]),
         "decoder_sparse_step=2, mlp_only_layers=[1]"),
        ("Qwen3Moe", MOE | dict(num_experts_per_tok=5), "at most num_experts=4"),
        ("Qwen3Moe", MOE | dict(use_sliding_window=True), "use_sliding_window=True"),
        ("SmolLM3", dict(no_rope_layers=[0, 1, 2] * 3), "no_rope_layers="),
        ("SmolLM3", dict(no_rope_layers=[0, 1]), "each of 7 layers"),
        ("SmolLM3", dict(use_sliding_window=True), "use_sliding_window=True"),
        ("Olmo2", dict(attention_bias=True), "attention_bias=True"),
        ("Qwen3Moe", {}, "lacks moe_intermediate_size"),
    ],
)  # fmt: skip
def test_switches_that_are_not_implemented(architecture, fields, words):
    with pytest.raises(ConfigError) as caught:
        parse(architecture, **fields)
    assert words in str(caught.value) and "\n" not in str(caught.value)
