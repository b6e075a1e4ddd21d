"""Adapters against peft on the same tiny models, and what is frozen beside them."""

import dataclasses
import functools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny_models import FAMILIES, save_tiny_model, tiny_config
from transformers import AutoModelForCausalLM

from grpo_jax.config import ConfigError, LoraSection, MeshSection
from grpo_jax.learner.batching import make_sft_batch
from grpo_jax.learner.forward import make_forward_step, to_micro_batches
from grpo_jax.learner.optimizer import read_leaf
from grpo_jax.model.hf import inspect_folder, load_params, save_folder, stored_tensors
from grpo_jax.model.lora import (
    NOTHING,
    abstract_trained,
    init_adapters,
    join,
    merged,
    num_trained,
    split,
    trained_shardings,
)
from grpo_jax.model.peft import (
    CONFIG,
    WEIGHTS,
    adapter_readers,
    adapter_specs,
    inspect_adapter,
    read_section,
    save_adapter,
    with_adapters,
)
from grpo_jax.model.sharding import make_mesh
from grpo_jax.model.transformer import abstract_params, num_params

VOCAB, RANK, ALPHA = 56, 4, 6.0
SECTION = LoraSection(rank=RANK, alpha=ALPHA)
ROWS = [([3, 9, 4], [5, 11, 7, 2]), ([8, 1], [30, 41, 12, 50, 6])]
KERNELS = ("q", "k", "v", "o", "gate", "up", "down")
FUSED = dict(qkv_proj=("q", "k", "v"), o_proj=("o",), gate_up_proj=("gate", "up"), down_proj=("down",))
"""Phi-3's layers, and the kernels of each."""


def mesh_of(*sizes):
    return make_mesh(MeshSection(*sizes), jax.devices()[: math.prod(sizes)])


ONE = mesh_of(1, 1, 1)


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A tiny model with a random adapter, neither of its matrices zero: as peft made and saved it."""

    torch_model: object
    folder: object
    """Of the model, with the adapters in its configuration."""
    path: object
    """Of the PEFT folder."""

    @property
    def config(self):
        return self.folder.config

    def params(self, mesh=ONE):
        frozen = load_params(self.folder, self.config, mesh)
        return join(frozen, jax.tree.map(read_leaf, adapter_readers(self.path, self.config, mesh)))


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """Returns `adapted(family)`, made once."""

    @functools.cache
    def make(family="qwen2"):
        path = tmp_path_factory.mktemp(family)
        sizes = dict(vocab_size=VOCAB, tie_word_embeddings=True, pad_token_id=0)
        model = save_tiny_model(path / "model", family, scale=0.2, **sizes)
        has_experts = family == "qwen3_moe"  # which get no adapters
        names = ["q_proj", "k_proj", "v_proj", "o_proj"] if has_experts else "all-linear"
        wanted = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=names, task_type="CAUSAL_LM", lora_dropout=0.0
        )
        model = peft.get_peft_model(model, wanted)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(0, 0.3)
        model.save_pretrained(path / "adapter")
        folder = inspect_folder(path / "model")
        section = dataclasses.replace(SECTION, targets=("attention",)) if has_experts else SECTION
        config = with_adapters(folder.config, section)
        return Adapted(model, dataclasses.replace(folder, config=config), path / "adapter")

    return make


@functools.cache
def forward_of(config, mesh=ONE):
    return make_forward_step(config, mesh, temperature=1.0, chunk_tokens=8)


def micro_batch(mesh=ONE, shape=(2, 16)):
    batch = make_sft_batch(ROWS, pad_id=0)
    [micro] = to_micro_batches(batch, shape, mesh)[0]
    return micro


def our_logprobs(params, config):
    """Of the tokens of `ROWS` after the first of each, in order."""
    logprobs, _ = forward_of(config)(params, micro_batch())[0]
    lengths = [len(prompt) + len(response) for prompt, response in ROWS]
    micro = micro_batch()
    found = np.asarray(logprobs)[np.asarray(micro.positions) > 0]
    assert len(found) == sum(lengths) - len(lengths)
    return found


def torch_logprobs(model):
    chosen = []
    for prompt, response in ROWS:
        ids = torch.tensor([[*prompt, *response]])
        logp = torch.log_softmax(model(ids).logits[0, :-1], dim=-1)
        chosen.append(logp.gather(1, ids[0, 1:, None])[:, 0])
    return torch.cat(chosen)


def weights(size):
    return np.random.default_rng(5).normal(size=size).astype(np.float32)


# ---- against peft ----


def test_experts_get_no_adapters(tmp_path):
    save_tiny_model(tmp_path / "model", "qwen3_moe", vocab_size=VOCAB)
    message = "lora.targets='all-linear': experts and their router get no adapters: choose attention"
    with pytest.raises(ConfigError, match=re.escape(message)):
        with_adapters(inspect_folder(tmp_path / "model").config, LoraSection(rank=4))


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_pefts(adapted, family):
    model = adapted(family)
    inspect_adapter(model.path, model.config, model.folder)
    got = our_logprobs(model.params(), model.config)
    with torch.no_grad():
        expected = torch_logprobs(model.torch_model).numpy()
        model.torch_model.disable_adapter_layers()
        without = torch_logprobs(model.torch_model).numpy()
        model.torch_model.enable_adapter_layers()
    np.testing.assert_allclose(got, expected, atol=2e-5)
    assert np.abs(expected - without).max() > 0.1  # the adapter does something


@pytest.mark.parametrize(
    ("family", "remat"),
    [
        *(
            pytest.param(name, "dots", marks=() if name in ("gemma3", "phi3") else pytest.mark.slow)
            for name in FAMILIES
        ),
        ("qwen2", "none"),
        ("qwen2", "full"),
    ],
)
def test_gradients_are_pefts(adapted, family, remat):
    """Of a weighted sum of log-probabilities, by both programs of an update: within 1e-5 of the largest."""
    model = adapted(family)
    config = dataclasses.replace(model.config, remat=remat)
    params, micro = model.params(), micro_batch()
    is_token = np.asarray(micro.positions) > 0
    of_tokens = weights(is_token.sum())
    (_, entropy), kept = forward_of(config)(params, micro)
    cotangent = np.zeros(is_token.shape, np.float32)
    cotangent[is_token] = of_tokens
    [grads] = kept.pullback(kept.arrays, params)((jnp.asarray(cotangent), jnp.zeros_like(entropy)))
    got = stored_tensors(grads, adapter_specs(config), config, np.float32)

    model.torch_model.zero_grad()
    for name, parameter in model.torch_model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    (torch_logprobs(model.torch_model) * torch.tensor(of_tokens)).sum().backward()
    named = model.torch_model.named_parameters()
    expected = {n.replace(".default", ""): p.grad.numpy() for n, p in named if p.grad is not None}
    num_adapters = len(FUSED if config.is_fused else config.lora.targets)
    assert got.keys() == expected.keys() and len(got) == 2 * 2 * num_adapters  # of both layers
    largest = max(np.abs(grad).max() for grad in expected.values())
    for name, grad in expected.items():
        np.testing.assert_allclose(got[name], grad, atol=1e-5 * largest, rtol=0, err_msg=name)


@pytest.mark.parametrize("family", ["qwen2", "phi3"])
def test_peft_loads_what_is_saved(adapted, tmp_path, family):
    model = adapted(family)
    save_adapter(tmp_path / "saved", split(model.params())[1], model.config, model.folder)
    assert load_file(tmp_path / "saved" / WEIGHTS).keys() == load_file(model.path / WEIGHTS).keys()
    base = AutoModelForCausalLM.from_pretrained(model.folder.path, dtype=torch.float32)
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "saved").eval()
    with torch.no_grad():
        expected = torch_logprobs(model.torch_model)
        assert torch.equal(torch_logprobs(loaded), expected)
    again = jax.tree.map(read_leaf, adapter_readers(tmp_path / "saved", model.config, ONE))
    jax.tree.map(np.testing.assert_array_equal, again, split(model.params())[1])


@pytest.mark.parametrize("family", ["qwen3", "phi3"])
def test_a_merged_folder_is_the_model_with_its_adapter(adapted, tmp_path, family):
    model = adapted(family)
    save_folder(tmp_path / "m", model.params(), model.config, files_from=model.folder.path, dtype="F32")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    with torch.no_grad():
        got, expected = torch_logprobs(loaded), torch_logprobs(model.torch_model)
    np.testing.assert_allclose(got, expected, atol=2e-5)


def test_what_is_merged_is_rounded_once():
    """1 + 2^-8 is halfway between two bfloat16 numbers; with 2^-20 more it is above."""
    kernel = jnp.ones((1, 1), jnp.bfloat16)
    a, b = jnp.ones((1, 1)), jnp.full((1, 1), 2.0**-8 + 2.0**-20)
    assert float(merged(kernel, (a, b), 1.0)[0, 0]) == 1 + 2**-7
    assert float(merged(kernel, (a, b), 0.5)[0, 0]) == 1  # 2^-9: nearer to 1
    assert merged(kernel, None, 1.0) is kernel


# ---- which parameters ----


def test_adapters_lie_beside_their_kernels_and_are_split_like_them():
    config = with_adapters(tiny_config(), SECTION)
    frozen, trained = split(abstract_params(config)[0])
    assert frozen == abstract_params(tiny_config())[0]
    attention, mlp = trained["layers"]["attention"], trained["layers"]["mlp"]
    assert trained.keys() == {"layers"} and len(attention) + len(mlp) == 2 * len(KERNELS)
    shape = lambda leaf: leaf.shape  # 3 layers, width 16, 4 heads, 2 of keys, of 4 numbers; 24 in the MLP
    assert jax.tree.map(shape, attention | mlp) == {
        "q_lora_a": (3, 16, 4), "q_lora_b": (3, 4, 4, 4),
        "k_lora_a": (3, 16, 4), "k_lora_b": (3, 4, 2, 4),
        "v_lora_a": (3, 16, 4), "v_lora_b": (3, 4, 2, 4),
        "o_lora_a": (3, 4, 4, 4), "o_lora_b": (3, 4, 16),
        "gate_lora_a": (3, 16, 4), "gate_lora_b": (3, 4, 24),
        "up_lora_a": (3, 16, 4), "up_lora_b": (3, 4, 24),
        "down_lora_a": (3, 24, 4), "down_lora_b": (3, 4, 16),
    }  # fmt: skip
    assert num_trained(config) == num_params(config) - num_params(tiny_config())
    attention = trained_shardings(config, mesh_of(2, 2, 2))["layers"]["attention"]
    axes = {name: tuple(sharding.spec) for name, sharding in attention.items()}
    assert axes["q_lora_a"] == (None, "fsdp", None) and axes["q_lora_b"] == (None, None, "tensor", None)
    assert axes["o_lora_a"] == (None, "tensor", None, None) and axes["o_lora_b"] == (None, None, "fsdp")


def test_split_and_join_undo_each_other():
    config = with_adapters(tiny_config(), SECTION)
    params = abstract_params(config)[0]
    assert join(*split(params)) == params
    whole = abstract_params(tiny_config())[0]
    assert split(whole) == (NOTHING, whole) and join(NOTHING, whole) is whole
    assert split(split(params)[1]) == (NOTHING, split(params)[1])


def test_what_is_frozen_has_the_dtype_of_the_computation():
    config = with_adapters(tiny_config(dtype=jnp.dtype("bfloat16")), SECTION)
    frozen, trained = split(abstract_params(config)[0])
    assert {leaf.dtype for leaf in jax.tree.leaves(frozen)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(trained)} == {jnp.dtype("float32")}
    assert config.trained_dtype == jnp.float32
    narrow = config.with_trained_dtype(jnp.dtype("bfloat16"))
    assert {leaf.dtype for leaf in jax.tree.leaves(abstract_trained(narrow))} == {jnp.dtype("bfloat16")}


def test_new_adapters_add_nothing(adapted):
    """The same bits as without, and A as peft draws it: uniform up to 1 / sqrt(inputs)."""
    model = adapted()
    fresh = init_adapters(model.config, jax.random.key(0), ONE)
    frozen = split(model.params())[0]
    without = dataclasses.replace(model.config, lora=None)
    got = our_logprobs(join(frozen, fresh), model.config)
    np.testing.assert_array_equal(got, our_logprobs(frozen, without))
    for name, inputs in (("attention/q", 16), ("attention/o", 16), ("mlp/down", 24)):
        module, kernel = name.split("/")
        a, b = (np.asarray(fresh["layers"][module][f"{kernel}_lora_{x}"]) for x in "ab")
        assert not b.any() and 0.8 / inputs**0.5 < np.abs(a).max() <= 1 / inputs**0.5
        assert not np.array_equal(a[0], a[1])  # layers differ


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("all-linear",), KERNELS),
        (("attention",), KERNELS[:4]),
        (("mlp",), KERNELS[4:]),
        (("q_proj", "v"), ("q", "v")),
        (("mlp.*", "self_attn.q_proj"), ("q", "gate", "up", "down")),
        (("*_proj",), KERNELS),
        (("[kv]_proj",), ("k", "v")),
    ],
)
def test_targets(targets, expected):
    config = with_adapters(tiny_config(), dataclasses.replace(SECTION, targets=targets))
    assert config.lora.targets == expected


@pytest.mark.parametrize("targets", [*((name,) for name in FUSED), ("*_proj",), ("mlp",)])
def test_kernels_of_one_tensor_are_chosen_together_and_share_an_a(targets):
    fused = tiny_config(is_fused=True)
    kernels = {"*_proj": KERNELS, "mlp": ("gate", "up", "down")}.get(targets[0]) or FUSED[targets[0]]
    config = with_adapters(fused, dataclasses.replace(SECTION, targets=targets))
    assert config.lora.targets == kernels
    layers = split(abstract_params(config)[0])[1]["layers"]
    names = {name for module in layers.values() for name in module}
    owners = set(kernels) - {"k", "v", "up"}
    assert names == {f"{name}_lora_a" for name in owners} | {f"{name}_lora_b" for name in kernels}
    with pytest.raises(ConfigError, match="there are all-linear, attention, mlp, qkv_proj, o_proj, gate_up"):
        with_adapters(fused, dataclasses.replace(SECTION, targets=("q",)))


# ---- nothing of what is frozen is copied ----


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_no_gradient_and_no_copy_of_what_is_frozen(adapted, remat):
    """What the forward pass keeps holds none of the frozen matrices, and its wide products once."""
    model = adapted()
    config = dataclasses.replace(model.config, remat=remat)
    params = model.params()
    _, kept = forward_of(config)(params, micro_batch())
    matrices = {
        leaf.shape for leaf in jax.tree.leaves(split(params)[0]) if leaf.size >= 256
    }  # k, the smallest, has so many
    assert not matrices & {array.shape for array in kept.arrays}
    if remat == "dots":
        wide = [
            array for array in kept.arrays if array.shape == (2, 32, 24)
        ]  # gate and up: 2 layers, 32 tokens
        assert len(wide) == 2


# ---- folders that are refused ----


@pytest.fixture
def refused(adapted, tmp_path):
    """Returns `refused(spoil, **section)`: the line with which a PEFT folder is refused after `spoil(folder)`."""
    model = adapted()

    def refuse(spoil=lambda folder: None, base=model.folder, **section):
        folder = tmp_path / "adapter"
        save_adapter(folder, split(model.params())[1], model.config, model.folder)
        spoil(folder)
        plain = inspect_folder(model.folder.path).config
        with pytest.raises(ConfigError) as caught:
            config = with_adapters(plain, dataclasses.replace(SECTION, **section))
            inspect_adapter(folder, config, base)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return refuse


def change_config(**changes):
    def spoil(folder):
        content = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(content | changes))

    return spoil


def test_adapters_that_do_not_fit(refused, adapted, tmp_path):
    assert "lora.rank='8'" in refused(rank=8) and "must be 4" in refused(rank=8)
    assert "lora.alpha='32'" in refused(alpha=32.0)
    assert "must be at most the model's width, hidden_size=16" in refused(rank=17)
    assert "is of no layer of lora.targets" in refused(targets=("attention",))
    dropped = lambda folder: drop_tensor(folder, "layers.1.mlp.down_proj.lora_B")
    assert "lacks base_model.model.model.layers.1.mlp.down_proj.lora_B.weight" in refused(dropped)
    assert "use_dora=True" in refused(change_config(use_dora=True))
    assert "peft_type='IA3'" in refused(change_config(peft_type="IA3"))
    assert "r of its adapter_config.json must be a number" in refused(change_config(r="4"))
    assert "lora.path" in refused(lambda folder: (folder / CONFIG).unlink())
    assert "holds a model beside adapter_config.json" in refused(
        lambda folder: (folder / "config.json").write_text("{}")
    )
    other = save_other_base(tmp_path / "other")
    assert "is an adapter of another base than" in refused(base=other)
    cut = lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-4])
    assert "is cut short" in refused(cut)
    assert "is damaged: adapter_model.safetensors" in refused(lambda folder: flip(folder / WEIGHTS))
    wider = lambda folder: resize(folder, "layers.0.self_attn.k_proj.lora_B")
    assert "is of another model" in refused(wider)


def drop_tensor(folder, part):
    tensors = {n: t for n, t in load_file(folder / WEIGHTS).items() if part not in n}
    save_file(tensors, folder / WEIGHTS)


def flip(file):
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def resize(folder, part):
    tensors = {n: t[:-1].copy() if part in n else t for n, t in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)


def save_other_base(path):
    save_tiny_model(path, vocab_size=VOCAB, tie_word_embeddings=True, scale=0.2, seed=1)
    return inspect_folder(path)


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        ("embed_tokens", "embedding and output head get no adapter"),
        ("lm_head", "embedding and output head get no adapter"),
        ("c_attn", "matches no layer of this model; there are all-linear, attention, mlp, q_proj, k_proj"),
        ("layers.0.*", "matches no layer"),
    ],
)
def test_targets_that_are_no_layers(targets, words):
    with pytest.raises(ConfigError, match=r"lora\.targets") as caught:
        with_adapters(tiny_config(), dataclasses.replace(SECTION, targets=(targets,)))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_that_holds_a_model_and_an_adapter_is_no_model(adapted, tmp_path):
    save_tiny_model(tmp_path / "both", vocab_size=VOCAB)
    (tmp_path / "both" / CONFIG).write_text("{}")
    with pytest.raises(ConfigError, match=r"model\.path=.*holds an adapter"):
        inspect_folder(tmp_path / "both")


def test_the_section_of_a_folder(adapted):
    """Whatever peft has written for the names of its layers."""
    model = adapted()
    section = read_section(model.path)
    assert (section.rank, section.alpha, section.path) == (RANK, ALPHA, str(model.path))
    plain = inspect_folder(model.folder.path).config
    assert with_adapters(plain, section).lora == model.config.lora
