"""Folders against transformers itself: logits, files, what is refused, and how much memory loading takes."""

import json
import math
import os
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from family_models import DEFAULT_ROPE, LINEAR_ROPE, LLAMA3_ROPE
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny_models import tiny_torch_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from grpo_jax.config import ConfigError, MeshSection, ModelSection
from grpo_jax.model import hf
from grpo_jax.model.config import parse_hf_config
from grpo_jax.model.hf import copy_side_files, inspect_folder, load_params, save_folder, write_eos_token_ids
from grpo_jax.model.rope import RopeScaling
from grpo_jax.model.sharding import make_mesh
from grpo_jax.model.transformer import forward, head_matrix

VOCAB = 320
# Heads of 8 channels and theta 100: wavelengths 2 pi (1, 100^(1/4), 10, 100^(3/4)) = 6.3, 20, 63, 199 positions.
# With 64 original positions those are 10.2, 3.2, 1.02 and 0.32 turns: the llama3 rule keeps the first (> 4),
# mixes the next two, and slows the last (< 1) by the whole factor.
THETA = 100.0
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": THETA,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 4.0,
}
FAMILIES = {
    "qwen2-tied": ("qwen2", dict(tie_word_embeddings=True, rope_parameters=DEFAULT_ROPE)),
    "qwen2-untied": ("qwen2", dict(tie_word_embeddings=False, rope_parameters=DEFAULT_ROPE)),
    "qwen3-tied": ("qwen3", dict(tie_word_embeddings=True, head_dim=8, rope_parameters=DEFAULT_ROPE)),
    "llama3": ("llama", dict(tie_word_embeddings=False, head_dim=8, rope_parameters=LLAMA3_ROPE)),
    "llama-linear": ("llama", dict(tie_word_embeddings=True, head_dim=8, rope_parameters=LINEAR_ROPE)),
    "qwen2-yarn": ("qwen2", dict(tie_word_embeddings=True, hidden_size=32, rope_parameters=YARN_ROPE)),
}


def random_torch_model(family):
    kind, changes = FAMILIES[family]
    ids = dict(vocab_size=VOCAB, eos_token_id=2, pad_token_id=0)
    model = tiny_torch_model(kind, seed=sum(map(ord, family)), **ids, **changes)
    model.generation_config = GenerationConfig(eos_token_id=[2, 5], pad_token_id=0)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Returns `folder(family)`: the family's random model as transformers saves it, and that model."""
    made = {}

    def folder(family):
        if family not in made:
            model = random_torch_model(family)
            path = tmp_path_factory.mktemp(family)
            model.save_pretrained(path)
            made[family] = path, model
        return made[family]

    return folder


def mesh_of(*sizes):
    return make_mesh(MeshSection(*sizes), jax.devices()[: math.prod(sizes)])


def copy_folder(source, target):
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def edit_json(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def edit_config(folder, **changes):
    """Sets keys of config.json; None deletes one."""

    def change(content):
        content.update(changes)
        for key in [key for key, value in changes.items() if value is None]:
            del content[key]

    edit_json(folder / "config.json", change)


def jax_logits(params, config, tokens, lengths):
    columns = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    segment_ids = (columns < np.array(lengths)[:, None]).astype(np.int32)
    with jax.default_matmul_precision("highest"):
        hidden = jax.jit(forward, static_argnums=1)(params, config, tokens, columns, segment_ids)
        return np.asarray(jnp.einsum("btd,vd->btv", hidden, head_matrix(params)))


def torch_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def random_tokens(*shape):
    return np.random.default_rng(0).integers(0, VOCAB, shape).astype(np.int32)


# Logits


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(folders, family):
    path, model = folders(family)
    tokens, lengths = random_tokens(2, 80), (80, 57)  # more positions than the 64 of the llama3 rule
    folder = inspect_folder(path)
    params = load_params(folder, folder.config, mesh_of(1, 1, 1))
    got = jax_logits(params, folder.config, tokens, lengths)
    for row, length in enumerate(lengths):
        want = torch_logits(model, tokens[row : row + 1, :length])[0]
        assert np.ptp(want) > 1  # logits that differ by little would agree whatever the code
        np.testing.assert_allclose(got[row, :length], want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["llama3", "llama-linear", "qwen2-yarn"])
def test_rope_scaling_is_felt_by_these_logits(folders, family):
    """The test above would not notice a scaling that these positions do not feel."""
    path, _ = folders(family)
    folder = inspect_folder(path)
    plain = parse_hf_config(
        json.loads((path / "config.json").read_text()) | {"rope_parameters": DEFAULT_ROPE}
    )
    params = load_params(folder, folder.config, mesh_of(1, 1, 1))
    tokens = random_tokens(1, 80)
    difference = jax_logits(params, folder.config, tokens, [80]) - jax_logits(params, plain, tokens, [80])
    assert np.abs(difference).max() > 0.1


@pytest.mark.parametrize(
    ("family", "rope", "old_rope_scaling"),
    [
        ("qwen2-tied", DEFAULT_ROPE, None),
        ("llama3", LLAMA3_ROPE, {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}),
        ("llama-linear", LINEAR_ROPE, {"type": "linear", "factor": 2.5}),  # "type" came before "rope_type"
        (
            "qwen2-yarn",
            YARN_ROPE,
            {"type": "yarn", "factor": 4.0, "beta_fast": 4.0, "original_max_position_embeddings": 64},
        ),
    ],
)
def test_rope_is_read_from_either_style_of_config(folders, tmp_path, family, rope, old_rope_scaling):
    path = copy_folder(folders(family)[0], tmp_path / "model")
    new_style = inspect_folder(path).config
    assert json.loads((path / "config.json").read_text())["rope_parameters"] == rope
    edit_config(path, rope_parameters=None, rope_theta=THETA)
    edit_json(path / "config.json", lambda content: content.update(rope_scaling=old_rope_scaling))
    assert inspect_folder(path).config == new_style
    # transformers takes the old style for the same thing: it is no invention of this test.
    assert rope.items() <= AutoConfig.from_pretrained(path).rope_parameters.items()


def test_config_by_hand(folders):
    section = ModelSection("", "bfloat16", "float32", remat="full", scan_layers=False, attention="plain")
    config = inspect_folder(folders("llama3")[0], section).config
    assert (config.vocab_size, config.hidden_size, config.intermediate_size, config.num_layers) == (
        320,
        16,
        24,
        2,
    )
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 2, 8)
    assert (config.rope_theta, config.rms_norm_eps, config.tie_embeddings) == (100.0, 1e-6, False)
    assert config.rope_scaling == RopeScaling("llama3", 4.0, 1.0, 4.0, 64)
    assert (config.qkv_bias, config.qk_norm, config.dtype, config.remat) == (
        False,
        False,
        jnp.bfloat16,
        "full",
    )
    assert (config.param_dtype, config.scan_layers, config.attention) == (jnp.float32, False, "plain")
    qwen2, qwen3 = (inspect_folder(folders(family)[0]).config for family in ("qwen2-tied", "qwen3-tied"))
    assert (qwen2.qkv_bias, qwen2.qk_norm, qwen2.head_dim) == (True, False, 4)  # 16 / 4, where no key says so
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim) == (False, True, 8)


def test_stop_tokens_come_from_the_generation_config_first(folders, tmp_path):
    path = copy_folder(folders("qwen2-tied")[0], tmp_path / "model")
    assert inspect_folder(path).eos_token_ids == (2, 5)
    (path / "generation_config.json").unlink()
    assert inspect_folder(path).eos_token_ids == (2,)  # config.json's
    edit_config(path, eos_token_id=None)
    assert inspect_folder(path).eos_token_ids == ()


def test_the_longest_sequence_is_that_of_config_json(folders, tmp_path):
    path = copy_folder(folders("qwen2-untied")[0], tmp_path / "model")
    held = json.loads((path / "config.json").read_text())["max_position_embeddings"]
    assert inspect_folder(path).max_position == held
    linear = {"rope_type": "linear", "factor": 2.5, "rope_theta": 100.0}
    changes = {"max_position_embeddings": 100, "rope_parameters": linear}
    edit_json(path / "config.json", lambda content: content.update(changes))
    assert inspect_folder(path).max_position == 250
    # Qwen's way: the window is that of before the scaling, and 4 x 64 are meant.
    edit_json(path / "config.json", lambda content: content.update(rope_parameters=YARN_ROPE))
    assert inspect_folder(path).max_position == 256
    assert not inspect_folder(path).config.can_extrapolate
    edit_json(path / "config.json", lambda content: content.update(max_position_embeddings=300))
    assert inspect_folder(path).max_position == 256  # vLLM has no table for more
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}
    edit_json(path / "config.json", lambda content: content.update(rope_parameters=dynamic))
    assert inspect_folder(path).max_position == 300  # beyond it, no two programs agree
    assert not inspect_folder(path).config.can_extrapolate
    del linear["rope_theta"]
    edit_json(path / "config.json", lambda content: content.pop("max_position_embeddings"))
    edit_json(path / "config.json", lambda content: content.update(rope_parameters=linear))
    assert inspect_folder(path).max_position is None


def test_stop_ids_are_written_where_they_are_read(folders, tmp_path):
    path = copy_folder(folders("qwen2-untied")[0], tmp_path / "model")  # whose ids are 2 and 5, and pad 0
    before = (path / "generation_config.json").read_bytes()
    write_eos_token_ids(path, (2, 5, 5))
    assert (path / "generation_config.json").read_bytes() == before
    write_eos_token_ids(path, (2, 5, 9, 2))
    assert inspect_folder(path).eos_token_ids == (2, 5, 9)
    assert json.loads((path / "generation_config.json").read_text())["pad_token_id"] == 0
    assert GenerationConfig.from_pretrained(path).eos_token_id == [2, 5, 9]
    (path / "generation_config.json").unlink()
    write_eos_token_ids(path, (2, 7))  # config.json has 2 alone
    assert inspect_folder(path).eos_token_ids == (2, 7)


# Loading and saving


def raw_tensors(folder):
    """Name -> (dtype, shape, bytes) over all weights files of a folder, read without this package."""
    result = {}
    for file in folder.glob("*.safetensors"):
        for name, value in load_file(file).items():
            assert name not in result
            result[name] = (value.dtype, value.shape, value.tobytes())
    return result


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_bit_identical(folders, tmp_path, tokenizer_folder, family):
    path = copy_folder(folders(family)[0], tmp_path / "model")
    for file in tokenizer_folder.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    folder = inspect_folder(path)
    params = load_params(folder, folder.config, mesh_of(1, 1, 1))
    saved = tmp_path / "saved"
    save_folder(saved, params, folder.config, files_from=path, dtype=folder.dtype)
    assert folder.dtype == "F32"
    assert raw_tensors(saved) == raw_tensors(path)
    side_files = sorted(file.name for file in path.iterdir() if file.suffix != ".safetensors")
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= set(
        side_files
    )
    written = sorted([*side_files, "manifest.json", "model.safetensors"])
    assert sorted(file.name for file in saved.iterdir()) == written
    assert all((saved / name).read_bytes() == (path / name).read_bytes() for name in side_files)


def test_only_what_belongs_to_a_model_is_copied_beside_its_weights(tmp_path):
    """A folder in which transformers' Trainer has saved, or the hub has weights of other frameworks."""
    ours = {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json",
        "merges.txt", "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "spiece.model",
        "qwen.tiktoken", "chat_template.jinja", "chat_template.json", "LICENSE", "LICENSE.txt", "Licence.md",
        "NOTICE", "README.md", "USE_POLICY.md", "additional_chat_templates/tools.jinja",
    }  # fmt: skip
    others = {
        "optimizer.pt", "scheduler.pt", "rng_state.pth", "scaler.pt", "trainer_state.json", "training_args.bin",
        "tf_model.h5", "flax_model.msgpack", "model.safetensors", "model.safetensors.index.json",
        "pytorch_model.bin", "pytorch_model.bin.index.json", "model.onnx", "model.gguf", "modeling_own.py",
        ".gitattributes", "original/tokenizer.model", "global_step10/mp_rank_00_model_states.pt", "latest",
        "adapter_config.json", "events.out.tfevents.1",
    }  # fmt: skip
    for name in ours | others:
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_text(name)
    (tmp_path / "copy").mkdir()
    copy_side_files(tmp_path / "model", tmp_path / "copy")
    copied = {str(p.relative_to(tmp_path / "copy")): p for p in (tmp_path / "copy").rglob("*") if p.is_file()}
    assert copied.keys() == ours
    assert all(path.read_text() == name for name, path in copied.items())


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_bfloat16_folders_round_trip_in_either_parameter_type(tmp_path, param_dtype):
    model = random_torch_model("qwen2-untied").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    folder = inspect_folder(tmp_path / "model").with_config(param_dtype=param_dtype)
    params = load_params(folder, folder.config, mesh_of(1, 1, 1))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(param_dtype)}
    embedding = model.model.embed_tokens.weight.detach().float().numpy()
    np.testing.assert_array_equal(np.asarray(params["embedding"], np.float32), embedding)
    assert folder.dtype == "BF16"
    save_folder(tmp_path / "saved", params, folder.config, files_from=folder.path, dtype=folder.dtype)
    assert raw_tensors(tmp_path / "saved") == raw_tensors(tmp_path / "model")
    assert raw_tensors(tmp_path / "saved")["model.norm.weight"][0] == ml_dtypes.bfloat16


def test_shards_and_their_index(folders, tmp_path):
    path, model = folders("qwen2-untied")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="12KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    folder = inspect_folder(tmp_path / "sharded")
    params = load_params(folder, folder.config, mesh_of(1, 1, 1))

    # 320 x 16 float32 are 20,480 bytes: the two embeddings each fill a shard; the rest are 10,432 bytes in all:
    # final norm 64; a layer: q, o 1,024 each, k, v 512 each, biases 64 + 32 + 32, MLP 3 x 1,536, norms 2 x 64.
    layer = 2 * 1024 + 2 * 512 + 128 + 3 * 1536 + 128
    save_folder(
        tmp_path / "saved", params, folder.config, files_from=folder.path, dtype="F32", max_shard_bytes=layer
    )
    files = sorted(file.name for file in (tmp_path / "saved").glob("*.safetensors"))
    assert files == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    index = json.loads((tmp_path / "saved" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2 * 20_480 + 64 + 2 * layer
    by_file = {name: load_file(tmp_path / "saved" / name) for name in files}
    assert {name: file for file, tensors in by_file.items() for name in tensors} == index["weight_map"]
    for tensors in by_file.values():
        assert len(tensors) == 1 or sum(value.nbytes for value in tensors.values()) <= layer
    assert raw_tensors(tmp_path / "saved") == raw_tensors(path)  # and from the single file, too
    model_again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    tokens = random_tokens(1, 9)
    np.testing.assert_array_equal(torch_logits(model_again, tokens), torch_logits(model, tokens))

    # Saving over it leaves nothing of the old folder behind.
    save_folder(tmp_path / "saved", params, folder.config, files_from=folder.path, dtype="F32")
    assert [file.name for file in (tmp_path / "saved").glob("*.safetensors*")] == ["model.safetensors"]
    assert not list(tmp_path.glob("*.tmp"))


def test_transformers_generates_the_same_text_from_a_saved_folder(
    folders, tmp_path, tokenizer_folder, tokenizer
):
    """Saved after a change, so that a copy of the old weights would be noticed."""
    path = copy_folder(folders("qwen3-tied")[0], tmp_path / "model")
    for file in tokenizer_folder.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    folder = inspect_folder(path)
    params = load_params(folder, folder.config, mesh_of(1, 2, 2))
    params = jax.tree.map(lambda x: x * 1.25, params)  # exact in both frameworks
    save_folder(tmp_path / "saved", params, folder.config, files_from=path, dtype="F32")

    expected = random_torch_model("qwen3-tied")
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter.mul_(1.25)
    prompt = "What is 2 + 3?"
    texts = []
    saved_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    saved_model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    for model, used in ((expected, tokenizer), (saved_model, saved_tokenizer)):
        inputs = used(prompt, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        texts.append((output.tolist(), used.decode(output[0])))
    assert texts[0] == texts[1]
    assert saved_model.generation_config.eos_token_id == [2, 5]


# Meshes

# Which mesh axis splits which dimension; None: none does. The first dimension of "layers" is the layer.
SPLIT = {
    "embedding": ("tensor", "fsdp"),
    "lm_head": ("tensor", "fsdp"),
    "final_norm/scale": ("fsdp",),
    "layers/attention_norm/scale": (None, "fsdp"),
    "layers/mlp_norm/scale": (None, "fsdp"),
    "layers/attention/q": (None, "fsdp", "tensor", None),
    "layers/attention/k": (None, "fsdp", "tensor", None),
    "layers/attention/v": (None, "fsdp", "tensor", None),
    "layers/attention/q_bias": (None, "tensor", None),
    "layers/attention/k_bias": (None, "tensor", None),
    "layers/attention/v_bias": (None, "tensor", None),
    "layers/attention/o": (None, "tensor", None, "fsdp"),
    "layers/mlp/gate": (None, "fsdp", "tensor"),
    "layers/mlp/up": (None, "fsdp", "tensor"),
    "layers/mlp/down": (None, "tensor", "fsdp"),
}


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1), (1, 1, 4)], ids=str)
def test_each_device_holds_only_its_slice(folders, sizes):
    folder = inspect_folder(folders("qwen2-untied")[0])
    whole = load_params(folder, folder.config, mesh_of(1, 1, 1))
    mesh = mesh_of(*sizes)
    params = load_params(folder, folder.config, mesh)
    axes = dict(zip(("data", "fsdp", "tensor"), sizes, strict=True))
    leaves = {
        "/".join(key.key for key in path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    assert set(leaves) == set(SPLIT)
    wholes = dict(zip(leaves, jax.tree.leaves(whole), strict=True))
    for name, leaf in leaves.items():
        expected = tuple(
            # Two key/value heads do not divide by 4: that rule is dropped, the dimension stays whole.
            n if axis is None or n % axes[axis] else n // axes[axis]
            for n, axis in zip(leaf.shape, SPLIT[name], strict=True)
        )
        assert len(leaf.addressable_shards) == mesh.size
        for shard in leaf.addressable_shards:
            assert shard.data.shape == expected, name
            np.testing.assert_array_equal(shard.data, np.asarray(wholes[name])[shard.index])
        np.testing.assert_array_equal(leaf, wholes[name])


# Refusals


@pytest.fixture
def weights_unread(monkeypatch):
    """Fails the test if a weight is read. Names, shapes and dtypes of a file may be."""

    class Header:
        def __init__(self, file, framework):
            self._file = safe_open(file, framework=framework)

        def __enter__(self):
            self._file.__enter__()
            return self

        def __exit__(self, *error):
            return self._file.__exit__(*error)

        def keys(self):
            return self._file.keys()

        def get_slice(self, name):
            tensor = self._file.get_slice(name)
            return SimpleNamespace(get_shape=tensor.get_shape, get_dtype=tensor.get_dtype)

    monkeypatch.setattr(hf, "safe_open", Header)


@pytest.fixture
def refused(folders, tmp_path, weights_unread):
    """Returns `refused(spoil, family)`: the one line with which a folder is refused after `spoil(folder)`."""

    def refuse(spoil, family="qwen2-untied"):
        path = copy_folder(folders(family)[0], tmp_path / "model")
        inspect_folder(path)
        spoil(path)
        with pytest.raises(ConfigError) as caught:
            inspect_folder(path)
        assert caught.value.key == "model.path"
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return refuse


def resave(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["FalconForCausalLM"]}, ["FalconForCausalLM", "Qwen2ForCausalLM"]),
        ({"architectures": ["XForCausalLM"], "logit_scale": 0.5, "clip_qkv": 8, "b": None},
         ["no family here knows clip_qkv, logit_scale"]),
        ({"architectures": None}, ["(none)", "architecture"]),
        ({"hidden_size": None}, ["config.json", "lacks hidden_size"]),
        ({"vocab_size": None}, ["config.json", "lacks vocab_size"]),
        ({"num_attention_heads": None}, ["config.json", "lacks num_attention_heads"]),
        ({"hidden_act": "gelu"}, ["hidden_act=gelu", "silu"]),
        ({"hidden_act": "gelu", "mlp_bias": True},
         ["hidden_act=gelu, mlp_bias=True", "hidden_act=silu, mlp_bias=False"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config={'bits': 4}", "None"]),
        ({"use_sliding_window": 1}, ["use_sliding_window=1", "true or false"]),
        ({"use_sliding_window": True, "sliding_window": 0}, ["sliding_window=0", "at least 1"]),
        ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": "all"},
         ["max_window_layers='all'"]),
        ({"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention"]},
         ["layer_types=", "each of 2 layers"]),
        ({"layer_types": ["sliding_attention"] * 2}, ["layer_types=", "without windows"]),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, ["lacks original_max_position_embeddings"]),
        ({"rope_parameters": YARN_ROPE | {"rope_theta": 1.0}}, ["rope_theta=1.0", "above 1"]),
        ({"rope_parameters": YARN_ROPE | {"factor": 0.5}}, ["factor=0.5", "at least 1"]),
        ({"rope_parameters": YARN_ROPE | {"truncate": 1}}, ["truncate=1", "true or false"]),
        ({"rope_parameters": None, "rope_scaling": {"type": "ntk", "factor": 2.0}}, ["rope_type=ntk"]),
        ({"rope_parameters": None, "rope_scaling": {"type": "dynamic"}}, ["lacks factor"]),
        ({"rope_parameters": {"rope_type": "linear"}}, ["lacks factor"]),
        ({"rope_parameters": LLAMA3_ROPE | {"factor": 8.0} | {"low_freq_factor": 1.0}, "intermediate_size": 25},
         ["mlp.gate_proj.weight", "[24, 16]", "[25, 16]"]),
        ({"num_hidden_layers": 3}, ["model.layers.2.", "missing"]),
        ({"num_key_value_heads": 4}, ["self_attn.k_proj.weight", "[8, 16]", "[16, 16]"]),
    ],
)  # fmt: skip
def test_configs_that_are_refused(refused, changes, words):
    message = refused(lambda folder: edit_config(folder, **changes))
    assert [word for word in words if word not in message] == []


def test_attention_bias_of_other_families_is_refused(refused):
    assert "attention_bias=True" in refused(lambda folder: edit_config(folder, attention_bias=True), "llama3")


def test_broken_json_and_missing_files_are_refused(refused, tmp_path):
    assert (
        "config.json" in (message := refused(lambda f: (f / "config.json").unlink())) and "missing" in message
    )
    (tmp_path / "model" / "config.json").write_text('{"architectures": [')
    with pytest.raises(ConfigError, match=r"config.json.*is not JSON"):
        inspect_folder(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"org/name.*no such folder.*hf download"):
        inspect_folder("org/name")


def test_missing_weights_are_refused(refused):
    message = refused(lambda folder: (folder / "model.safetensors").unlink())
    assert "model.safetensors" in message and "missing" in message


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.self_attn.v_proj.bias"])
def test_a_missing_tensor_is_named(refused, name):
    message = refused(lambda folder: resave(folder, lambda tensors: tensors.pop(name)))
    assert f"tensor {name} is missing" in message


def test_a_misshapen_tensor_is_named(refused):
    name = "model.layers.1.mlp.down_proj.weight"

    def transpose(tensors):
        tensors[name] = np.ascontiguousarray(tensors[name].T)

    message = refused(lambda folder: resave(folder, transpose))
    assert f"tensor {name} has shape [24, 16]" in message and "[16, 24]" in message


def test_a_tensor_of_integers_is_refused(refused):
    def to_int8(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.int8)

    message = refused(lambda folder: resave(folder, to_int8))
    assert "model.norm.weight" in message and "I8" in message


def header_length(file):
    return struct.unpack("<Q", file.read_bytes()[:8])[0]


@pytest.mark.parametrize(
    "where", ["empty", "within the length", "within the header", "after the header", "half way", "last byte"]
)
def test_a_file_that_is_cut_short_is_refused(refused, where):
    def cut(folder):
        file = folder / "model.safetensors"
        size, header = file.stat().st_size, header_length(file)
        kept = {
            "empty": 0,
            "within the length": 5,
            "within the header": 8 + header // 2,
            "after the header": 8 + header,
            "half way": size // 2,
            "last byte": size - 1,
        }[where]
        file.write_bytes(file.read_bytes()[:kept])

    message = refused(cut)
    assert "model.safetensors" in message and "cut short" in message


def test_a_file_that_is_too_long_is_refused(refused):
    """A download that was resumed at the wrong place."""

    def append(folder):
        with (folder / "model.safetensors").open("ab") as file:
            file.write(b"once more")

    assert "instead of" in refused(append)


@pytest.mark.parametrize(
    "content",
    [
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 988097824\n",  # cloned without LFS
        b"<!DOCTYPE html><html><body>Please log in</body></html>",
        struct.pack("<Q", 16) + b"\xff\xfe" * 8,
        struct.pack("<Q", 16) + b"not a JSON text!",
        struct.pack("<Q", 9) + b"[1, 2, 3]",
        struct.pack("<Q", 8) + b'{"a": 1}',
        struct.pack("<Q", 24) + b'{"a": {"dtype": "F32"}} ',
    ],
)
def test_a_file_of_another_kind_is_refused(refused, content):
    message = refused(lambda folder: (folder / "model.safetensors").write_bytes(content))
    assert "model.safetensors" in message and "is not a safetensors file" in message


@pytest.fixture
def sharded(folders, tmp_path):
    folders("qwen2-untied")[1].save_pretrained(tmp_path / "sharded", max_shard_size="12KB")
    inspect_folder(tmp_path / "sharded")
    return tmp_path / "sharded"


def test_a_missing_shard_is_named(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ConfigError, match=f"{shard.name}.*missing"):
        inspect_folder(sharded)


def test_a_shard_that_is_cut_short_is_named(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ConfigError, match=f"{shard.name}.*cut short"):
        inspect_folder(sharded)


def test_an_index_that_names_an_absent_file_is_refused(sharded):
    index = sharded / "model.safetensors.index.json"
    edit_json(
        index, lambda content: content["weight_map"].update({"model.norm.weight": "model-9.safetensors"})
    )
    with pytest.raises(ConfigError, match=r"model-9.safetensors.*missing"):
        inspect_folder(sharded)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_inspecting_takes_no_memory_for_the_weights(tmp_path):
    """A sparse file of a billion bytes: nothing is there to be read."""
    sizes = dict(vocab_size=1000, hidden_size=2500, intermediate_size=8000, num_hidden_layers=3)
    config = {"architectures": ["LlamaForCausalLM"], "num_attention_heads": 25, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config | sizes))
    header, end = {}, 0
    for name, size in hf.stored_bytes(parse_hf_config(config | sizes), np.float32).items():
        header[name] = {"dtype": "F32", "shape": [1], "data_offsets": [end, end + size]}
        end += size
    for spec, name, _, shape in hf.each_tensor(parse_hf_config(config | sizes)):
        header[name]["shape"] = hf.stored_shape(spec, shape)
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    before = resident()
    assert len(inspect_folder(tmp_path).tensors) == len(header) == 29 and end > 1e9
    assert resident() - before < 50e6


def test_unused_tensors_are_logged(folders, tmp_path, caplog):
    path = copy_folder(folders("qwen2-tied")[0], tmp_path / "model")
    resave(path, lambda tensors: tensors.update({"model.extra": np.ones(3, np.float32)}))
    inspect_folder(path)
    assert "model.extra" in caplog.text


# Memory

PEAK = """
import sys, pathlib
from grpo_jax.config import MeshSection
from grpo_jax.model.hf import inspect_folder, load_params
from grpo_jax.model.sharding import make_mesh
import jax

def status(key):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])

mesh = make_mesh(MeshSection(1, int(sys.argv[3]), 1), jax.devices()[: int(sys.argv[3])])
def load(path):
    folder = inspect_folder(path)
    return jax.block_until_ready(load_params(folder, folder.config, mesh))
load(sys.argv[1])  # XLA's own start: threads, compiler, arenas
before = status("VmRSS")
params = load(sys.argv[2])
print("PEAK", status("VmHWM") - before, sum(leaf.nbytes for leaf in jax.tree.leaves(params)))
"""


def write_model(folder, *, width, mlp, layers):
    """A Llama folder of small random integers, written tensor by tensor."""
    folder.mkdir()
    sizes = dict(vocab_size=1024, hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers)
    heads = dict(num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=True)
    config = {"architectures": ["LlamaForCausalLM"], **sizes, **heads}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (1024, width), "model.norm.weight": (width,)}
    for i in range(layers):
        name = f"model.layers.{i}."
        shapes |= {f"{name}self_attn.{n}_proj.weight": (width, width) for n in "qkvo"}
        shapes |= {f"{name}mlp.{n}_proj.weight": (mlp, width) for n in ("gate", "up")}
        shapes |= {f"{name}mlp.down_proj.weight": (width, mlp)}
        shapes |= {f"{name}{n}_layernorm.weight": (width,) for n in ("input", "post_attention")}
    rng = np.random.default_rng(0)
    tensors = {name: rng.integers(0, 9, shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("fsdp", [1, 4])
def test_loading_takes_little_more_memory_than_the_model(tmp_path, fsdp):
    """The model once, and one tensor of one layer a few times: mapped, copied, placed."""
    write_model(tmp_path / "tiny", width=64, mlp=128, layers=2)
    size = write_model(tmp_path / "large", width=512, mlp=1280, layers=16)
    assert 180e6 < size < 220e6
    command = [sys.executable, "-c", PEAK, str(tmp_path / "tiny"), str(tmp_path / "large"), str(fsdp)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    growth, loaded = map(int, result.stdout.split("PEAK")[1].split())
    assert loaded == size
    assert 0.9 * size < growth <= 1.25 * size, f"{growth / size:.2f} times the model"
