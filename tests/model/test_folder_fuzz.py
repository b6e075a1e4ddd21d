"""Whatever a model's folder holds: it is read as what it says, or one line says what is wrong with which file.

The examples are random, and the same in every run.
"""

import contextlib
import io
import json
import shutil

import fuzz_helpers as fuzz
import pytest
import tiny_models
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.config import ConfigError
from grpo_jax.model.config import parse_hf_config
from grpo_jax.model.families import FAMILIES
from grpo_jax.model.hf import inspect_folder, verify_weights
from grpo_jax.model.rope import max_position
from grpo_jax.model.tensors import tensor_specs
from grpo_jax.run.inputs import load_model_tokenizer

KEYS = [
    *("architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "rope_theta", "rope_scaling", "rope_parameters"),
    *("rms_norm_eps", "tie_word_embeddings", "hidden_act", "attention_bias", "mlp_bias", "eos_token_id"),
    *("use_sliding_window", "max_position_embeddings", "sliding_window", "model_type", "layer_types"),
]
ROPE_NUMBERS = (
    *(
        "factor",
        "rope_theta",
        "low_freq_factor",
        "high_freq_factor",
        "attention_factor",
        "beta_fast",
        "beta_slow",
    ),
    *("mscale", "mscale_all_dim", "partial_rotary_factor"),
)
FAMILY_KEYS = [
    *("max_window_layers", "sliding_window_pattern", "_sliding_window_pattern", "rope_local_base_freq"),
    *("query_pre_attn_scalar", "final_logit_softcapping", "attn_logit_softcapping", "hidden_activation"),
    *("partial_rotary_factor", "original_max_position_embeddings", "num_experts", "num_experts_per_tok"),
    *("moe_intermediate_size", "norm_topk_prob", "mlp_only_layers", "decoder_sparse_step", "no_rope_layers"),
    *("no_rope_layer_interval", "quantization_config", "num_local_experts"),
]
ROPES = st.fixed_dictionaries(
    {"rope_type": st.sampled_from(["linear", "llama3", "default", "yarn", "dynamic", "longrope", None])},
    optional={name: fuzz.JSON | st.floats(0.5, 8) for name in ROPE_NUMBERS}
    | {
        "original_max_position_embeddings": fuzz.JSON | st.integers(1, 99),
        "truncate": fuzz.JSON | st.booleans(),
        "short_factor": fuzz.JSON | st.lists(st.floats(0.5, 8), min_size=2, max_size=2),
        "sliding_attention": fuzz.JSON | st.just({"rope_type": "default"}),
        "full_attention": fuzz.JSON | st.just({"rope_type": "yarn"}),
    },
)
FILES = ("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tokenizer_folder):
    """A folder in order, of two weight files."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    shutil.copytree(tokenizer_folder, folder)
    tiny_models.tiny_torch_model("qwen2", vocab_size=300).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "model")


def check(path, *, with_tokenizer=False):
    """Reads the folder as a run does before it touches a device."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            model = inspect_folder(path)
            if with_tokenizer:
                load_model_tokenizer(model)
        verify_weights(path)
    except ConfigError as error:
        return fuzz.check_refusal(error)
    sizes = model.config
    for size in (sizes.vocab_size, sizes.num_layers, sizes.num_heads, sizes.num_kv_heads, sizes.head_dim):
        assert type(size) is int and size > 0
    assert sizes.num_heads % sizes.num_kv_heads == 0 and sizes.head_dim % 2 == 0
    assert type(sizes.rope_theta) is float and type(sizes.rms_norm_eps) is float
    assert model.max_position is None or (type(model.max_position) is int and model.max_position > 0)
    assert type(sizes.tie_embeddings) is bool and all(type(i) is int for i in model.eos_token_ids)
    assert tensor_specs(sizes)


@fuzz.lengths(100, 2000)
def test_a_config_json_of_any_values(num_examples, folder):
    content = json.loads((folder / "config.json").read_text())
    changes = st.dictionaries(st.sampled_from(KEYS), fuzz.JSON | ROPES | st.none(), min_size=1, max_size=2)

    @settings(fuzz.STEADY, max_examples=num_examples)
    @given(changes=changes, gone=st.sets(st.sampled_from(KEYS), max_size=1))
    def holds(changes, gone):
        changed = {name: value for name, value in (content | changes).items() if name not in gone}
        (folder / "config.json").write_text(json.dumps(changed))
        check(folder)

    holds()


@fuzz.lengths(150, 4000)
def test_a_config_json_of_any_family(num_examples):
    """Read without weights: whatever is accepted has shapes and tensors."""
    sizes = dict(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4
    )
    content = sizes | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, head_dim=8)
    keys = st.sampled_from(KEYS[1:] + FAMILY_KEYS)
    kinds = st.lists(st.sampled_from(["sliding_attention", "full_attention"]), min_size=3, max_size=3)
    values = (
        fuzz.JSON | ROPES | kinds | st.lists(st.integers(0, 1), min_size=3, max_size=3) | st.integers(1, 9)
    )

    @settings(fuzz.STEADY, max_examples=num_examples)
    @given(family=st.sampled_from(list(FAMILIES)), changes=st.dictionaries(keys, values, max_size=3))
    def holds(family, changes):
        hf = {"architectures": [family]} | content | changes
        try:
            config, longest = parse_hf_config(hf), max_position(hf)
        except ConfigError as error:
            return fuzz.check_refusal(error)
        assert longest is None or longest > 0
        assert len(config.windows) in (0, config.num_layers)
        assert len(config.other_rope_layers) in (0, config.num_layers)
        assert hash(config) and (config.num_layers > 99 or tensor_specs(config))

    holds()


@fuzz.lengths(40, 2000)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_json_of_any_shape(num_examples, name, folder):
    shaped = fuzz.JSON | st.fixed_dictionaries({"weight_map": fuzz.JSON, "eos_token_id": fuzz.JSON})

    @settings(fuzz.STEADY, max_examples=num_examples)
    @given(content=shaped)
    def holds(content):
        (folder / name).write_text(json.dumps(content))
        check(folder)

    holds()


def damaged(folder, names, num_examples, *, with_tokenizer):
    contents = {name: (folder / name).read_bytes() for name in names}

    @settings(fuzz.STEADY, max_examples=num_examples)
    @given(data=st.data())
    def holds(data):
        name = data.draw(st.sampled_from(names))
        (folder / name).write_bytes(data.draw(fuzz.damages(contents[name])))
        check(folder, with_tokenizer=with_tokenizer)
        (folder / name).write_bytes(contents[name])

    holds()


@fuzz.lengths(100, 2000)
def test_bytes_that_are_damaged(num_examples, folder):
    weights = [file.name for file in folder.glob("*.safetensors")]
    damaged(folder, [*weights, *FILES[:2], FILES[3]], num_examples, with_tokenizer=False)


@fuzz.lengths(15, 400)
def test_a_tokenizer_that_is_damaged(num_examples, folder):
    damaged(folder, TOKENIZER_FILES, num_examples, with_tokenizer=True)
