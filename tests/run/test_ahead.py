"""A small model's programs, compiled for TPUs that are not there: `pip install 'jax[tpu]'`, no TPU needed."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import pytest
from config_helpers import gsm8k

from grpo_jax.config import ConfigError, MeshSection
from grpo_jax.learner.compiling import compile_ahead
from grpo_jax.learner.hlo import BETWEEN_SLICES
from grpo_jax.learner.memory import abstract_mesh, plan_memory
from grpo_jax.learner.offload import device_bytes
from grpo_jax.model.config import ModelConfig
from grpo_jax.model.counts import head_weights, layer_weights
from grpo_jax.model.fused_attention import choose_kernel, mesh_device_kind
from grpo_jax.model.sharding import abstract_like, make_mesh
from grpo_jax.model.transformer import abstract_params, param_shardings
from grpo_jax.rollout import device_programs
from grpo_jax.run.ahead import compile_run
from grpo_jax.run.targets import describe
from grpo_jax.weight_sync.wire import BLOCK_BYTES

pytestmark = pytest.mark.libtpu

MODEL = ModelConfig(
    vocab_size=8192, hidden_size=512, intermediate_size=1536, num_layers=6, num_heads=4, num_kv_heads=2,
    head_dim=128, rope_theta=1e6, rms_norm_eps=1e-6, tie_embeddings=False, qkv_bias=True, qk_norm=False,
    dtype=jnp.dtype("bfloat16"), param_dtype=jnp.dtype("float32"), attention="splash", remat="full",
)  # fmt: skip
CHANGES = {
    "model.remat": "full",
    "rollout.engine": "local",
    "optim.offload": False,
    "algorithm.ref_offload": False,
    "actor.micro_batch_size_per_device": 2,
    "actor.logits_chunk_tokens": 256,
}
CONFIG = gsm8k(**CHANGES)


def distance(a, b):
    return sum(abs(x - y) for x, y in zip(a.coords, b.coords, strict=True))


def test_neighbours_on_an_axis_are_neighbours_in_the_slice():
    """All 16 chips along fsdp make a ring of links; with tensor=4, each of its rings is a line of the grid."""
    devices = describe("tpu-v5e", 16).devices
    assert len(devices) == 16 and {d.platform for d in devices} == {"tpu"}
    ring = make_mesh(MeshSection(1, -1, 1), devices).devices.ravel().tolist()
    assert all(distance(a, b) == 1 for a, b in itertools.pairwise([*ring, ring[0]]))
    for row in make_mesh(MeshSection(1, -1, 4), devices).devices.reshape(4, 4):
        assert all(distance(a, b) == 1 for a, b in itertools.pairwise(row))


def test_slices_are_joined_along_data():
    devices = describe("tpu-v5e", 8, 2).devices
    mesh = make_mesh(MeshSection(4, 2, 1), devices)
    slices = [{d.slice_index for d in mesh.devices[i].flat} for i in range(4)]
    assert slices == [{0}, {0}, {1}, {1}]
    with pytest.raises(ConfigError, match=r"mesh.data=1: must be a multiple of the 2 slices"):
        make_mesh(MeshSection(1, -1, 1), devices)


def test_the_kernel_is_that_of_the_devices_compiled_for():
    mesh = make_mesh(MeshSection(1, -1, 1), describe("tpu-v5e", 8).devices)
    assert jax.default_backend() != "tpu"
    assert choose_kernel("auto", "bfloat16", 128, mesh_device_kind(mesh)) == "splash"


@pytest.fixture(scope="module", autouse=True)
def products_as_in_a_run():
    """The suite's full float32 products, see conftest.py, are no setting that splash compiles with in bfloat16."""
    settings = {"jax_default_matmul_precision": None, "jax_enable_compilation_cache": False}
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module")
def compiled(products_as_in_a_run):
    return compile_run(CONFIG, MODEL, describe("tpu-v5e", 8).devices)


def test_splash_attention_is_in_the_programs(compiled):
    """Once in the forward pass; again in the backward pass, which computes it anew, beside its own two kernels."""
    kernels = {program.name: program.facts.kernels for program in compiled.programs}
    assert kernels["score"] == {"tpu_custom_call": 1} and kernels["gradients"] == {"tpu_custom_call": 3}
    assert {"cast", "optimizer", "sampling"} <= set(kernels)


def test_flops_are_those_of_the_model(compiled):
    """2 x 1,024 tokens on each device. Backward: every product twice, and once more those of the forward pass.

    But not the last one of each layer, `down`, whose result no gradient needs.
    """
    flops = {program.name: program.facts.flops for program in compiled.programs}
    layers, head, tokens = layer_weights(MODEL), head_weights(MODEL), 2 * 1024
    assert flops["score"] == pytest.approx(2 * tokens * (layers + head), rel=0.01)
    down = MODEL.num_layers * MODEL.intermediate_size * MODEL.hidden_size
    assert flops["gradients"] == pytest.approx(2 * tokens * (3 * layers - down + 3 * head), rel=0.01)


def gradient_bytes(model, mesh):
    """Of one device: as large as its part of the parameters, float32."""
    return device_bytes(abstract_like(abstract_params(model)[0], param_shardings(model, mesh)))


def test_slices_exchange_gradients_once_an_update(products_as_in_a_run):
    """Each chip its quarter of them; besides, whether they are finite, and their counts.

    Sampling asks whether all rows have ended. Nothing else goes between slices, and no micro-batch waits for it.
    """
    model = dataclasses.replace(MODEL, num_layers=2)
    config = gsm8k(**CHANGES | {"mesh.data": 2})
    devices = describe("tpu-v5e", 8, 2).devices
    mesh = make_mesh(config.mesh, devices)
    gradients = gradient_bytes(model, mesh)
    between = {
        program.name: program.facts.traffic[BETWEEN_SLICES]
        for program in compile_run(config, model, devices).programs
        if BETWEEN_SLICES in program.facts.traffic
    }
    assert between.keys() == {"sum of gradients", "sampling"}
    assert between["sampling"].num_bytes < 4096
    assert gradients < between["sum of gradients"].num_bytes < gradients + 4096


@pytest.mark.slow
def test_the_plan_counts_what_the_compiler_takes():
    """Within a tenth, for two layers as wide as Qwen2.5-7B's on a v5e-16 with two rows of 1,024 tokens.

    Small models take less than is counted: their layers' arrays find room in a memory that is not counted.
    """
    wide = dataclasses.replace(
        MODEL, vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_layers=2, num_heads=28,
        num_kv_heads=4,
    )  # fmt: skip
    config = gsm8k(**CHANGES | {"actor.logits_chunk_tokens": 1024})
    found = compile_run(config, wide, describe("tpu-v5e", 16).devices)
    plan = plan_memory(config, wide, abstract_mesh(1, 16, 1))
    for phase in ("update", "score", "optimizer"):
        assert found.phases[phase] == pytest.approx(plan.phases[phase], rel=0.1)


def test_a_small_model_takes_no_more_than_is_counted(compiled):
    plan = plan_memory(CONFIG, MODEL, abstract_mesh(1, 8, 1))
    assert compiled.phases["optimizer"] == pytest.approx(plan.phases["optimizer"], rel=0.01)
    held = sum(plan.held.values())
    for phase in ("update", "score"):
        assert held < compiled.phases[phase] < plan.phases[phase]


def test_the_embedding_is_not_gathered(compiled):
    """Of the two tables, 8,192 x 512 numbers of 2 bytes, the head alone is; no layer has so large an array."""
    table = 2 * MODEL.vocab_size * MODEL.hidden_size
    [score] = [program for program in compiled.programs if program.name == "score"]
    assert score.facts.traffic["all-gather"].num_bytes < 2 * table
    assert score.facts.traffic["all-to-all"].count == 1  # of what was looked up


def test_a_push_is_packed():
    """Each device gets whole buckets of at most 192 MiB, with a checksum for each block."""
    mesh = make_mesh(MeshSection(1, -1, 1), describe("tpu-v6e", 4).devices)
    config = gsm8k(**{"rollout.ray_address": "auto"})
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), abstract_params(MODEL)[0])
    params = abstract_like(shapes, param_shardings(MODEL, mesh))
    phase, programs = device_programs(config, MODEL, params, mesh)
    assert phase == "weight sync"
    for step, args, static in programs:
        (flat, blocks), size = compile_ahead(step, *args, **static)
        assert flat.sharding.is_fully_replicated and flat.dtype == jnp.bfloat16
        assert blocks.size * BLOCK_BYTES == 2 * flat.size <= 192 * 2**20
        assert size >= 2 * flat.size
