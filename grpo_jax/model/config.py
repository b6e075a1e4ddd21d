"""Sizes and switches of a model: `ModelConfig`, read from the content of a config.json and written back."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from grpo_jax.config import ModelSection, RandomModelSection
from grpo_jax.model.families import FAMILIES, find_family
from grpo_jax.model.fields import number, refusal, size, switch
from grpo_jax.model.rope import RopeScaling, max_position, parse_rope

RANDOM_MAX_POSITION = 4096
"""Tokens, `max_position_embeddings` of a random model."""


@dataclasses.dataclass(frozen=True)
class Lora:
    """Adapters beside a model's kernels, the only parameters that are trained. arXiv:2106.09685."""

    rank: int
    scale: float
    """Of A B, what is added to a kernel: alpha / rank."""
    targets: tuple[str, ...]
    """The kernels that have one, by their names in the parameter tree."""
    param_dtype: Any = jnp.float32
    """Of the adapters that the optimizer changes."""


FIRST_OF_FUSED = {"k": "q", "v": "q", "up": "gate"}
"""Kernels that a folder stores as one tensor have one adapter, as in `peft`: the others' A is the first's."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of one model, and how it computes."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    tie_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    """Whether the queries and keys of each head are normed."""
    rope_scaling: RopeScaling | None = None
    rotary_dim: int = 0
    """Channels of each head that are rotated, the first ones. 0: all."""
    other_rope_theta: float = 0.0
    """Of the layers that are named next, without scaling. 0: they do not rotate."""
    other_rope_layers: tuple[bool, ...] = ()
    """Of each layer, whether it rotates otherwise than by `rope_theta`. (): none does."""
    windows: tuple[int, ...] = ()
    """Of each layer, how many tokens a token sees, itself included; 0: all. (): no layer has a window."""
    score_width: float = 0.0
    """Scores are divided by its root. 0: by that of `head_dim`."""
    qk_norm_whole: bool = False
    """Whether the queries of all heads are normed together, and the keys."""
    activation: str = "silu"
    """A key of `transformer.ACTIVATIONS`."""
    norm_plus_one: bool = False
    """Whether a norm multiplies by 1 + its scale."""
    norm_in_float32: bool = False
    """Whether it does so before its result is rounded to `dtype`, as it does with 1 + its scale."""
    pre_norms: bool = True
    """Whether attention and MLP have a norm before them."""
    post_norms: bool = False
    """Whether they have one after them, before their result is added."""
    embedding_scale: float = 1.0
    """Embeddings are multiplied by it."""
    logits_soft_cap: float = 0.0
    """Of the logits, before the temperature divides them. 0: none."""
    num_experts: int = 0
    """E, each an MLP of `intermediate_size`, in every layer. 0: there is one MLP."""
    experts_per_token: int = 0
    """How many of them a token's result is made of."""
    norm_shares: bool = False
    """Whether the shares of these are made to sum to 1."""
    is_fused: bool = False
    """Whether the folder holds q, k and v as one tensor, and gate and up as one."""
    dtype: Any = jnp.float32
    """Of activations and matrix products."""
    param_dtype: Any = jnp.float32
    """Of the parameters; with `lora`, of those that are frozen."""
    remat: str = "none"
    """"none", or a key of `transformer.REMAT_POLICIES`."""
    scan_layers: bool = True
    attention: str | Callable[..., Any] = "plain"
    """Kernel for whole rows: as `fused_attention.choose_kernel` returns it, or a function like those kernels."""
    experts: str | Callable[..., Any] = "dense"
    """How experts are computed: as `experts.choose_experts` returns it, or a `GroupedProduct`."""
    lora: Lora | None = None
    """None: every parameter is trained."""

    @property
    def trained_dtype(self) -> Any:
        """Of the parameters that the optimizer changes."""
        return self.param_dtype if self.lora is None else self.lora.param_dtype

    def with_trained_dtype(self, dtype: Any) -> "ModelConfig":
        """The same model with another `trained_dtype`."""
        if self.lora is None:
            return dataclasses.replace(self, param_dtype=dtype)
        return dataclasses.replace(self, lora=dataclasses.replace(self.lora, param_dtype=dtype))

    @property
    def score_divisor(self) -> float | None:
        """Of attention's scores. None: the root of `head_dim`."""
        return math.sqrt(self.score_width) if self.score_width else None

    @property
    def can_extrapolate(self) -> bool:
        """Whether trainer and sampler agree on positions beyond the window (docs/families.md)."""
        return self.rope_scaling is None or self.rope_scaling.kind in ("linear", "llama3")


def parse_hf_config(hf: dict[str, Any], section: ModelSection | None = None) -> ModelConfig:
    """Reads the content of a config.json.

    Args:
        section: the `model` section, for what config.json does not say: dtypes, remat, scan_layers. None:
            float32, nothing recomputed.
    Raises: ConfigError: an architecture, or a switch of one, that this package does not implement.
    """
    family = find_family(hf)
    hf = family.defaults | hf
    theta, scaling = parse_rope(hf)
    fields = _parse_sizes(hf) | family.switches | family.read(hf) | _computation(section)
    rotary_dim = _rotary_dim(hf)
    if scaling is not None and scaling.short_factors:
        num, pairs = len(scaling.short_factors), (rotary_dim or fields["head_dim"]) // 2
        if num != pairs:
            raise refusal(
                "short_factor", num, f"numbers there must be {pairs}, one for each pair of channels"
            )
    config = ModelConfig(
        **fields,
        rotary_dim=rotary_dim,
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=number(hf, "rms_norm_eps", 1e-6),
        tie_embeddings=switch(hf, "tie_word_embeddings"),
    )
    longest = None if config.can_extrapolate else max_position(hf)
    if longest and min(config.windows, default=0) >= longest:  # no sequence fills them: any kernel will do
        config = dataclasses.replace(config, windows=())
    return config


def _parse_sizes(hf: dict[str, Any]) -> dict[str, Any]:
    """The sizes among the fields of `ModelConfig`."""
    hidden, heads = size(hf, "hidden_size"), size(hf, "num_attention_heads")
    kv_heads, head_dim = size(hf, "num_key_value_heads", heads), size(hf, "head_dim", hidden // heads)
    if heads % kv_heads:
        raise refusal("num_key_value_heads", kv_heads, f"must divide num_attention_heads={heads}")
    if head_dim % 2:
        raise refusal("head_dim", head_dim, "must be even, for RoPE")
    return dict(
        vocab_size=size(hf, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=size(hf, "intermediate_size"),
        num_layers=size(hf, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
    )


def _rotary_dim(hf: dict[str, Any]) -> int:
    """Channels of each head that are rotated. 0: all of them."""
    share = number(
        hf, "partial_rotary_factor", number(hf.get("rope_parameters") or {}, "partial_rotary_factor", 1.0)
    )
    channels = int(_parse_sizes(hf)["head_dim"] * share)
    if share > 1 or channels < 2 or channels % 2:
        raise refusal(
            "partial_rotary_factor", share, "must leave an even number of a head's channels, at least 2"
        )
    return 0 if share == 1 else channels


def random_model_config(sizes: RandomModelSection, section: ModelSection | None = None) -> ModelConfig:
    """Returns a Qwen2-shaped model of the given sizes. Args: section: as in `parse_hf_config`."""
    return ModelConfig(
        **dataclasses.asdict(sizes),
        head_dim=sizes.hidden_size // sizes.num_heads,
        rope_theta=10_000.0,
        rms_norm_eps=1e-6,
        tie_embeddings=True,
        **FAMILIES["Qwen2ForCausalLM"].switches,
        **_computation(section),
    )


def hf_config(config: ModelConfig, eos_token_id: int, pad_token_id: int) -> dict[str, Any]:
    """Returns the config.json of a new Qwen2-shaped model; trained models keep the file they came with."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": RANDOM_MAX_POSITION,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "use_sliding_window": False,
        "dtype": "float32",
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
    }


def _computation(section: ModelSection | None) -> dict[str, Any]:
    """The fields of `ModelConfig` that the `model` section sets. The kernel depends on the devices as well."""
    if section is None:
        return {}
    return dict(
        dtype=jnp.dtype(section.dtype),
        param_dtype=jnp.dtype(section.param_dtype),
        remat=section.remat,
        scan_layers=section.scan_layers,
    )
