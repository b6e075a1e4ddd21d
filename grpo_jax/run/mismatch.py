"""Scores the same completions by every program there is: engine, trainer, other kernels, heads and dtypes.

Prompts and parameters enter, `Scores` leave: for each program one log-probability a token. What they say about the
difference between trainer and engine is worked out in `mismatch_report.py`. Nothing is trained or written.
"""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from grpo_jax.config import Config, ConfigError, RolloutSection
from grpo_jax.learner.batching import make_train_batch
from grpo_jax.learner.forward import ForwardStep, Inputs, make_forward_step, score_rows
from grpo_jax.learner.optimizer import read_leaf
from grpo_jax.learner.packing import micro_batch_shape
from grpo_jax.model.config import ModelConfig
from grpo_jax.model.experts import choose_experts
from grpo_jax.model.fused_attention import choose_kernel, mesh_device_kind
from grpo_jax.model.hf import ModelFolder
from grpo_jax.model.logprobs import capped
from grpo_jax.model.sharding import num_batch_shards
from grpo_jax.model.transformer import forward, head_matrix, param_shardings
from grpo_jax.rollout import EngineError, RolloutEngine, SamplingParams, make_engine, rollout_sampling
from grpo_jax.rollout.base import derive_seed
from grpo_jax.rollout.local import truncate
from grpo_jax.run.devices import check_dtype
from grpo_jax.run.inputs import first_params
from grpo_jax.types import Params, Prompt, RolloutGroup, TrainBatch

logger = logging.getLogger(__name__)

SAMPLED, GIVEN, GIVEN_HEAD = "engine sampled", "engine given", "engine float32 head"
TRAINER, GRADIENTS, UNTRUNCATED, TRUNCATED = "trainer", "trainer gradients", "untruncated", "truncated"
PLAIN, HEAD, PLAIN_HEAD = "plain attention", "float32 head", "plain attention, float32 head"
TRUTH = "float32"
"""Keys of `Comparison.logprobs`, beside the names of other dtypes. `TRUTH`: all products and sums in float32."""

OTHER_DTYPES = ("bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Log-probabilities of the same tokens by several programs."""

    logprobs: dict[str, np.ndarray]
    """Key of the program -> [tokens] float32; of all completions, one after the other."""
    missing: dict[str, str]
    """Key of a program that could not be run -> why."""
    dtype: str
    """Of the configured computation."""
    attention: str
    """The trainer's kernel."""


@dataclasses.dataclass(frozen=True)
class Program:
    """One way in which the trainer could compute log-probabilities."""

    key: str
    model: ModelConfig
    has_float32_head: bool = False

    @property
    def is_float32(self) -> bool:
        return jnp.dtype(self.model.dtype) == jnp.float32


def check_model(config: Config) -> None:
    """Raises: ConfigError: the run would still have to make the model that it starts from."""
    rule = "makes a model of its own first: name a finished folder, as --config.model.path=WORKDIR/sft-model "
    rule += "(or random-model) --config.sft.num_steps=0"
    if config.model.path == "random":
        raise ConfigError("model.path", config.model.path, rule)
    if config.sft.num_steps:
        raise ConfigError("sft.num_steps", config.sft.num_steps, rule)


def compare(
    config: Config,
    folder: ModelFolder,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    mesh: Mesh,
    *,
    float32_head: RolloutSection | None,
) -> Comparison:
    """Samples one completion of each prompt with the configured engine, and scores it by every program.

    Args:
        folder: of the model, with the attention kernel of the devices and the run's adapters.
        float32_head: of a second engine, with its head in float32; None: there is none.

    Raises: EngineError: the configured engine cannot be started, or fails.
    """
    exact = folder.with_config(param_dtype=jnp.dtype(jnp.float32))
    params = jax.tree.map(read_leaf, first_params(config, exact, exact.config, mesh))
    sampling = dataclasses.replace(rollout_sampling(config), num_samples=1)
    start = functools.partial(_open_engine, config, folder, tokenizer, mesh, params)
    found, missing = {}, {}
    with start(config.rollout) as engine:
        seed = derive_seed(config.trainer.seed, 0, "mismatch")
        groups = engine.generate(prompts, sampling, seed=seed, progress="sampling")
        found[SAMPLED] = np.concatenate([c.sampler_logprobs for g in groups for c in g.completions])
        batch = make_train_batch(groups, pad_id=tokenizer.pad_token_id or 0)
        if batch.drawable is not None:  # then every row but this one is cut at the same tokens
            missing[GIVEN] = "it is of the whole distribution, without rollout.top_p and rollout.top_k"
        else:
            try:
                found[GIVEN] = _engine_scores(engine, groups, sampling)
            except EngineError as error:
                missing[GIVEN] = str(error)
    if float32_head is not None:
        try:
            with start(float32_head) as engine:
                found[GIVEN_HEAD] = _engine_scores(engine, groups, sampling)
        except EngineError as error:
            missing[GIVEN_HEAD] = str(error)
    with jax.set_mesh(mesh):
        of_trainer, not_run = score_programs(config, folder.config, params, batch, mesh)
        found, missing = found | of_trainer, missing | not_run
        if not np.isfinite(found[TRAINER]).all():
            name = jnp.dtype(folder.config.dtype).name
            rule = "gives log-probabilities that are not finite: its range is too small for this model"
            raise ConfigError("model.dtype", name, rule)
        if sampling.is_cut and batch.drawable is None:
            mass = log_kept_mass(config, folder.config, params, batch, mesh)
            found |= {UNTRUNCATED: found[SAMPLED] + mass, TRUNCATED: found[TRAINER] - mass}
    found = {key: np.asarray(values, np.float32) for key, values in found.items()}
    return Comparison(found, missing, jnp.dtype(folder.config.dtype).name, str(folder.config.attention))


@contextlib.contextmanager
def _open_engine(
    config: Config, folder: ModelFolder, tokenizer: Any, mesh: Mesh, params: Params, section: RolloutSection
) -> Any:
    """An engine with the parameters, which ends with the context."""
    longest = config.data.max_prompt_length + config.data.max_response_length
    engine = make_engine(
        section,
        folder=folder,
        mesh=mesh,
        tokenizer=tokenizer,
        max_model_len=longest
        + 1,  # a prompt that is scored has a whole completion in it, and one token after
    )
    with contextlib.closing(engine):
        engine.sleep()
        engine.load_weights(params, version=0)
        yield engine


def _engine_scores(
    engine: RolloutEngine, groups: Sequence[RolloutGroup], sampling: SamplingParams
) -> np.ndarray:
    return np.concatenate(engine.score(groups, temperature=sampling.temperature))


# ---- the trainer's programs ----


def trainer_programs(config: Config, model: ModelConfig, mesh: Mesh) -> list[Program]:
    """What is run beside the trainer's own program. Args: model: with the attention kernel of the devices."""
    is_fused = model.attention != "plain"
    plain = _plain(model)
    programs = [Program(HEAD, model, has_float32_head=True)]
    if is_fused:
        programs += [Program(PLAIN, plain), Program(PLAIN_HEAD, plain, has_float32_head=True)]
    for dtype in OTHER_DTYPES:
        if jnp.dtype(dtype) == model.dtype:
            continue
        wanted = "auto" if is_fused or config.model.attention == "auto" else "plain"
        try:
            check_dtype(dtype, mesh)
            kind, has_windows = mesh_device_kind(mesh), any(model.windows)
            kernel = choose_kernel(wanted, dtype, model.head_dim, kind, has_windows)
        except ConfigError:  # the devices do not compute in it
            continue
        other = dataclasses.replace(model, dtype=jnp.dtype(dtype), attention=kernel)
        other = dataclasses.replace(other, experts=choose_experts(config.model.experts, other, kind))
        programs.append(Program(dtype, other if kernel != "plain" else _plain(other)))
    return [
        *programs,
        Program(TRUTH, dataclasses.replace(plain, dtype=jnp.dtype(jnp.float32), experts="dense")),
    ]


def _plain(model: ModelConfig) -> ModelConfig:
    # Plain attention would keep the scores of every layer for a backward pass that nobody runs.
    return dataclasses.replace(model, attention="plain", remat="full")


def score_programs(
    config: Config, model: ModelConfig, params: Params, batch: TrainBatch, mesh: Mesh
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Scores a host batch by the trainer's program, twice, and by those beside it.

    Args:    params: float32.
    Returns: key of the program -> [tokens] float32 of the completions; and key -> why it could not be run.
    """
    found, missing = {}, {}
    step = _forward_step(config, Program(TRAINER, model), mesh)
    # The backward pass starts from what this very program returns: there is no other to compare.
    for key in (TRAINER, GRADIENTS):
        found[key] = _score(config, step, model, params, batch, mesh)
    for program in trainer_programs(config, model, mesh):
        logger.info("scoring: %s", program.key)
        step = _forward_step(config, program, mesh)
        # As configured, but for what is there to be exact.
        in_full = program.key == TRUTH or (program.has_float32_head and not program.is_float32)
        context = jax.default_matmul_precision("highest") if in_full else contextlib.nullcontext()
        try:
            with context:
                found[program.key] = _score(config, step, program.model, params, batch, mesh)
        except jax.errors.JaxRuntimeError as error:  # out of memory, or a kernel that the device lacks
            missing[program.key] = str(error).partition("\n")[0]
    return found, missing


def _forward_step(config: Config, program: Program, mesh: Mesh) -> ForwardStep:
    return make_forward_step(
        program.model,
        mesh,
        temperature=config.rollout.temperature,
        chunk_tokens=config.actor.logits_chunk_tokens,
        head_dtype=jnp.float32 if program.has_float32_head else None,
    )


def _score(
    config: Config, step: ForwardStep, model: ModelConfig, params: Params, batch: TrainBatch, mesh: Mesh
) -> np.ndarray:
    """[tokens] float32 of the completions. Args: params: float32."""
    shape = micro_batch_shape(config, config.completions_per_update, num_batch_shards(mesh))
    if jnp.dtype(model.dtype) != jnp.float32:
        cast = lambda params: jax.tree.map(lambda x: x.astype(model.dtype), params)
        params = jax.jit(cast, out_shardings=param_shardings(model, mesh))(params)
    scores = score_rows(step, params, batch, shape, mesh)
    return scores[np.asarray(batch.completion_mask) > 0]


# ---- top-p and top-k ----


def log_kept_mass(
    config: Config, model: ModelConfig, params: Params, batch: TrainBatch, mesh: Mesh
) -> np.ndarray:
    """The log of what top-p and top-k leave of the trainer's distribution, at each token of the completions.

    It is the difference between a log-probability of the whole distribution and one of what is sampled from.

    Args:    params: float32; batch: without `drawable`, as of an engine that does not tell what it left.
    Returns: [tokens] float32, at most 0.
    """
    sampling = rollout_sampling(config)

    @jax.jit
    def kept(params: Params, inputs: Inputs) -> Any:
        hidden, head = forward(params, model, *inputs[:3]), head_matrix(params)

        def of_column(hidden: jax.Array) -> jax.Array:
            logits = jnp.einsum("bd,vd->bv", hidden, head, preferred_element_type=jnp.float32)
            logits = capped(logits, model.logits_soft_cap) / sampling.temperature
            whole = jax.nn.logsumexp(logits, axis=-1)
            return jax.nn.logsumexp(truncate(logits, sampling), axis=-1) - whole

        mass = jax.lax.map(of_column, jnp.moveaxis(hidden, 1, 0))  # [T, R]; column t is about token t + 1
        return (jnp.roll(mass.T, 1, axis=1), None), None

    return _score(config, ForwardStep(kept), model, params, batch, mesh)
