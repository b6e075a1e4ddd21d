"""The local rollout engine: a jitted sampler with a key/value cache, sharded like the trainer.

Prompts are padded on their left, so that every row writes the same column of the cache at the same time.
Each distinct prompt is read once and its cache copied to its G rows. A row's random numbers depend on the
seed, the prompt's place in the call, the sample's number and the token's number, never on its neighbours.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from tqdm import tqdm

from grpo_jax.config import Config, ConfigError, RolloutSection
from grpo_jax.model.cards import Card
from grpo_jax.model.config import ModelConfig
from grpo_jax.model.hf import ModelFolder
from grpo_jax.model.logprobs import capped, pack_bits, token_logprobs
from grpo_jax.model.sharding import batch_sharding, fetch, num_batch_shards, place, replicated
from grpo_jax.model.transformer import (
    Cache,
    bucket_length,
    forward_cached,
    head_matrix,
    init_cache,
    split_layers,
)
from grpo_jax.rollout import local_sizes
from grpo_jax.rollout.base import Finding, PendingGroups, RolloutEngine, SamplingParams, rollout_sampling
from grpo_jax.rollout.shared import Channel
from grpo_jax.types import Completion, Params, Prompt, RolloutGroup, Workload

logger = logging.getLogger(__name__)

JAX_SHARE = 0.75
"""Of a GPU's memory: what JAX takes by default."""
SCORE_TOKENS = 4096
"""Tokens whose logits exist at once while completions are scored."""


# What `grpo_jax.rollout` calls. The engine has no devices and no parameters of its own, so little is to be done.


def check_engine(section: RolloutSection) -> None:
    """See `rollout.check_engine`. Always there."""


def share_devices(section: RolloutSection) -> None:
    """See `rollout.share_devices`."""


def is_installed(section: RolloutSection) -> bool:
    """See `rollout.is_installed`. Always there."""
    return True


def try_installation(section: RolloutSection) -> Iterator[Finding]:
    """See `rollout.try_installation`. It needs nothing but JAX."""
    return iter(())


def check_platform(section: RolloutSection, platform: str) -> None:
    """See `rollout.check_platform`. Runs on any."""


def trainer_share(section: RolloutSection) -> float:
    """See `rollout.trainer_share`."""
    return JAX_SHARE


def push_bytes(section: RolloutSection) -> int:
    """See `rollout.push_bytes`. Nothing is pushed."""
    return 0


def with_float32_head(section: RolloutSection) -> RolloutSection:
    """See `rollout.with_float32_head`."""
    rule = "has no setting for its output head: its logits are summed in float32, as the trainer's are"
    raise ConfigError("rollout.engine", "local", rule)


def sampling_bytes(config: Config, model: ModelConfig, mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """See `rollout.sampling_bytes`."""
    return local_sizes.sampling_bytes(config, model, mesh)


def shares_parameters(section: RolloutSection) -> bool:
    """See `rollout.shares_parameters`."""
    return True


def memory_rows(section: RolloutSection) -> list[tuple[str, str]]:
    """See `rollout.memory_rows`."""
    return []


def memory_savers(section: RolloutSection) -> list[tuple[str, Any]]:
    """See `rollout.memory_savers`."""
    return []


def expected_seconds(
    section: RolloutSection, model: ModelConfig, card: Card, work: Workload, num_devices: int
) -> dict[str, float]:
    """See `rollout.expected_seconds`. Nothing is predicted."""
    return {}


def device_programs(config: Config, model: ModelConfig, params: Params, mesh: Mesh) -> tuple[str, list[Any]]:
    """See `rollout.device_programs`. Which token ends a completion does not matter to the program."""
    engine = LocalEngine(model, mesh, None, (0,), config.rollout.batch_size)
    prompts, columns = config.data.train_batch_size, config.data.max_prompt_length
    return "sampling", [engine.sampling_program(params, prompts, columns, rollout_sampling(config))]


def check_devices(section: RolloutSection, mesh: Mesh) -> None:
    """See `rollout.check_devices`. The devices are the trainer's."""


def make_engine(
    section: RolloutSection,
    *,
    folder: ModelFolder,
    mesh: Mesh,
    tokenizer: Any,
    stop_token_ids: tuple[int, ...],
    max_model_len: int,
    lora_push: str,
) -> RolloutEngine:
    """See `rollout.make_engine`. A cache is made for each batch, so `max_model_len` does not matter."""
    return LocalEngine(folder.config, mesh, tokenizer, stop_token_ids, section.batch_size)


def share_engine(section: RolloutSection, channel: Channel, **arguments: Any) -> RolloutEngine:
    """The engine of a run with several processes. All sample together, on the mesh of all of them."""
    return make_engine(section, **arguments)


class LocalEngine:
    """Samples from the trainer's own parameters, on the trainer's own devices."""

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        tokenizer: Any,
        stop_token_ids: tuple[int, ...],
        batch_size: int,
    ):
        """Args: batch_size: completions decoded at once; rounded up to whole groups and batch shards."""
        if not stop_token_ids:
            logger.warning(
                "neither model nor tokenizer names an EOS token: every completion runs to its limit"
            )
        self._config, self._mesh, self._tokenizer = config, mesh, tokenizer
        self._stop_token_ids, self._batch_size = stop_token_ids, batch_size
        self._params: Params = None
        self._version = -1

    def load_weights(self, params: Params, version: int) -> None:
        """Keeps a reference; the arrays must stay alive until the next call."""
        self._params, self._version = params, version

    def submit(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        *,
        seed: int,
        finished: Mapping[int, RolloutGroup] = {},
        progress: str = "",
    ) -> PendingGroups:
        """See `RolloutEngine.submit`. The work is done when it is asked for: there is one set of devices."""
        return _Deferred(partial(self._generate, prompts, sampling, seed, finished, progress), finished)

    def sleep(self) -> None:
        """Nothing to give up: the parameters are the trainer's."""

    def close(self) -> None:
        """Nothing to end."""

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, *, seed: int, progress: str = ""
    ) -> list[RolloutGroup]:
        """See `RolloutEngine.generate`."""
        return self._generate(prompts, sampling, seed, {}, progress)

    def _generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        seed: int,
        finished: Mapping[int, RolloutGroup],
        progress: str,
    ) -> list[RolloutGroup]:
        assert self._params is not None, "load_weights comes before generate"
        groups = dict(finished)
        # Prompts of like length share a batch: less padding, fewer shapes.
        missing = [i for i in range(len(prompts)) if i not in groups]
        order = sorted(missing, key=lambda i: len(prompts[i].token_ids))
        per_batch = self._prompts_per_batch(len(prompts), sampling.num_samples)
        with (
            jax.set_mesh(self._mesh),
            tqdm(total=len(order) * sampling.num_samples, desc=progress, unit="completion",
                 leave=False, disable=None if progress else True) as bar,
        ):  # fmt: skip
            for start in range(0, len(order), per_batch):
                chosen = order[start : start + per_batch]
                rows = self._sample(prompts, chosen, per_batch, sampling, seed)
                for i, group in zip(chosen, rows, strict=True):
                    groups[i] = RolloutGroup(prompts[i], group)
                bar.update(len(chosen) * sampling.num_samples)
        return [groups[i] for i in range(len(prompts))]

    def sampling_program(
        self, params: Params, num_prompts: int, columns: int, sampling: SamplingParams
    ) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """The jitted function of `generate`, its arguments for prompts of up to `columns` tokens, and static ones.

        Args: params: `jax.ShapeDtypeStruct`s with shardings; so are the arguments.
        """
        rows = self._prompts_per_batch(num_prompts, sampling.num_samples)
        even = rows % num_batch_shards(self._mesh) == 0
        split = (batch_sharding if even else replicated)(self._mesh)
        of = lambda *shape: jax.ShapeDtypeStruct(shape, np.int32, sharding=split)
        key = jax.eval_shape(lambda: jax.random.key(0))
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=replicated(self._mesh))
        static = dict(config=self._config, sampling=sampling, stop_token_ids=self._stop_token_ids)
        return sample_completions, (params, of(rows, bucket_length(columns)), of(rows), of(rows), key), static

    def score(self, groups: Sequence[RolloutGroup], *, temperature: float) -> list[np.ndarray]:
        """See `RolloutEngine.score`. With the cache of sampling, which is filled at once."""
        pairs = [(group.prompt.token_ids, c.token_ids) for group in groups for c in group.completions]
        columns = bucket_length(max(len(prompt) + len(ids) for prompt, ids in pairs))
        shards = num_batch_shards(self._mesh)
        size = -(-min(self._batch_size, len(pairs)) // shards) * shards
        tokens = np.zeros((-(-len(pairs) // size) * size, columns), np.int32)
        for row, (prompt, ids) in zip(tokens, pairs, strict=False):
            row[: len(prompt) + len(ids)] = (*prompt, *ids)
        score = partial(score_rows_cached, self._params, config=self._config, temperature=temperature)
        with jax.set_mesh(self._mesh):
            parts = [
                fetch(score(place(tokens[i : i + size], batch_sharding(self._mesh))))
                for i in range(0, len(tokens), size)
            ]
        return [
            row[len(prompt) : len(prompt) + len(ids)]
            for row, (prompt, ids) in zip(np.concatenate(parts), pairs, strict=False)
        ]

    def _prompts_per_batch(self, num_prompts: int, num_samples: int) -> int:
        return local_sizes.prompts_per_batch(
            self._batch_size, num_prompts, num_samples, num_batch_shards(self._mesh)
        )

    def _sample(
        self,
        prompts: Sequence[Prompt],
        chosen: Sequence[int],
        per_batch: int,
        sampling: SamplingParams,
        seed: int,
    ) -> list[tuple[Completion, ...]]:
        """Samples for one batch of prompts, filled up with empty rows to `per_batch`."""
        lengths = np.zeros(per_batch, np.int32)
        indices = np.zeros(per_batch, np.int32)
        columns = bucket_length(max(len(prompts[i].token_ids) for i in chosen))
        tokens = np.zeros((per_batch, columns), np.int32)
        for row, i in enumerate(chosen):
            prompt_ids = prompts[i].token_ids
            tokens[row, columns - len(prompt_ids) :] = prompt_ids
            lengths[row], indices[row] = len(prompt_ids), i
        even = per_batch % num_batch_shards(self._mesh) == 0
        put = partial(place, sharding=(batch_sharding if even else replicated)(self._mesh))
        sampled = sample_completions(
            self._params,
            put(tokens),
            put(lengths),
            put(indices),
            jax.random.key(seed),
            config=self._config,
            sampling=sampling,
            stop_token_ids=self._stop_token_ids,
        )
        ids, logprobs, counts, stopped, drawable = fetch(sampled)
        rows = range(len(chosen) * sampling.num_samples)
        texts = self._tokenizer.batch_decode(
            [ids[r, : counts[r]].tolist() for r in rows], skip_special_tokens=True
        )
        completions = [
            Completion(
                token_ids=tuple(ids[r, : counts[r]].tolist()),
                sampler_logprobs=tuple(logprobs[r, : counts[r]].tolist()),
                text=text,
                finish_reason="stop" if stopped[r] else "length",
                policy_version=self._version,
                drawable=None if drawable is None else drawable[r, : counts[r]].copy(),
            )
            for r, text in zip(rows, texts, strict=True)
        ]
        size = sampling.num_samples
        return [tuple(completions[i : i + size]) for i in range(0, len(completions), size)]


class _Deferred:
    """Groups that are sampled when they are waited for."""

    def __init__(self, generate: Callable[[], list[RolloutGroup]], finished: Mapping[int, RolloutGroup]):
        self._generate, self._finished = generate, dict(finished)

    def __call__(self) -> list[RolloutGroup]:
        return self._generate()

    def finished(self) -> dict[int, RolloutGroup]:
        return self._finished


@partial(jax.jit, static_argnames=("config", "sampling", "stop_token_ids"))
def sample_completions(
    params: Params,
    prompt_tokens: jax.Array,
    prompt_lengths: jax.Array,
    prompt_indices: jax.Array,
    key: jax.Array,
    *,
    config: ModelConfig,
    sampling: SamplingParams,
    stop_token_ids: tuple[int, ...],
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Samples `sampling.num_samples` completions of each prompt; stops early once every row has stopped.

    Args:
        prompt_tokens: [P, Tp] int32, padded on the left.
        prompt_lengths: [P] int32; 0 marks an empty row, which is not sampled.
        prompt_indices: [P] int32, the prompt's number, mixed into its random key.
    Returns:
        tokens: [B, max_tokens] int32, B = P * num_samples, the samples of a prompt side by side;
        logprobs: [B, max_tokens] float32; counts: [B] int32, tokens of each row, its stop token included;
        stopped: [B] bool, False where the limit cut the row;
        drawable: [B, max_tokens, ceil(V / 32)] uint32, as `Completion.drawable`; None without top-k and top-p.
    """
    size, limit = sampling.num_samples, sampling.max_tokens
    columns = prompt_tokens.shape[1]
    params = jax.tree.map(lambda x: x.astype(config.dtype), params)  # once, and not at every token
    hidden, read = _prefill(params, config, prompt_tokens, prompt_lengths)
    hidden = jnp.repeat(hidden, size, axis=0)
    cache: Cache = jax.tree.map(lambda x: _widen(jnp.repeat(x, size, axis=1), limit - 1), read)
    lengths = jnp.repeat(prompt_lengths, size)
    keys = _row_keys(key, prompt_indices, size)
    head = head_matrix(params)
    if not config.scan_layers:
        params, cache = split_layers(params, cache)
    column_ids, stops = jnp.arange(columns + limit - 1)[None], jnp.asarray(stop_token_ids, jnp.int32)[None]

    def draw(hidden: jax.Array, t: jax.Array | int) -> tuple[Any, jax.Array]:
        logits = jnp.einsum("bd,vd->bv", hidden, head, preferred_element_type=jnp.float32)
        logits = capped(logits, config.logits_soft_cap)
        drawn = sample_token(logits, jax.vmap(lambda k: jax.random.fold_in(k, t))(keys), sampling)
        return drawn, jnp.any(drawn[0][:, None] == stops, axis=1)

    def step(state: Any) -> Any:
        t, written, counts, stopped, cache = state
        visible = (column_ids >= columns - lengths[:, None]) & (column_ids < columns + t)
        last = jax.lax.dynamic_slice_in_dim(written[0], t - 1, 1, axis=1)
        position = (lengths + t - 1)[:, None]
        visible = visible[:, None, None, :]
        hidden, cache = forward_cached(params, config, last, position, visible, cache, columns + t - 1)
        drawn, is_stop = draw(hidden[:, 0], t)
        write = lambda all, one: jax.lax.dynamic_update_index_in_dim(all, one, t, axis=1)
        written = jax.tree.map(write, written, drawn)
        return t + 1, written, counts + ~stopped, stopped | is_stop, cache

    drawn, is_stop = draw(hidden, 0)
    empty = lengths == 0
    begin = lambda one: jnp.zeros((len(one), limit, *one.shape[1:]), one.dtype).at[:, 0].set(one)
    state = (jnp.int32(1), jax.tree.map(begin, drawn), jnp.where(empty, 0, 1), is_stop | empty, cache)
    state = jax.lax.while_loop(lambda s: (s[0] < limit) & ~jnp.all(s[3]), step, state)
    _, (tokens, logprobs, drawable), counts, stopped, _ = state
    return tokens, logprobs, counts, stopped, drawable


def _row_keys(key: jax.Array, prompt_indices: jax.Array, size: int) -> jax.Array:
    """A random key for each of `size` samples of each prompt, [P * size], whatever else is in the batch."""
    rows = jnp.repeat(prompt_indices, size) * size + jnp.tile(jnp.arange(size), len(prompt_indices))
    return jax.vmap(partial(jax.random.fold_in, key))(rows)


@partial(jax.jit, static_argnames=("config", "temperature"))
def score_rows_cached(
    params: Params, tokens: jax.Array, *, config: ModelConfig, temperature: float
) -> jax.Array:
    """Log-probability of every token given those before it, [B, T] float32, by the functions of sampling.

    Args: tokens: [B, T] int32, padded on the right, where nothing before sees it.
    """
    params = jax.tree.map(lambda x: x.astype(config.dtype), params)
    batch, columns = tokens.shape
    column = jnp.arange(columns)[None]
    mask = jnp.broadcast_to((column <= column.T)[None, None], (batch, 1, columns, columns))
    positions = jnp.broadcast_to(column, tokens.shape)
    empty = init_cache(config, batch, columns)
    hidden, _ = forward_cached(params, config, tokens, positions, mask, empty, 0)
    width = max(1, SCORE_TOKENS // batch)
    return token_logprobs(
        hidden,
        head_matrix(params),
        tokens,
        temperature=temperature,
        chunk_columns=width,
        soft_cap=config.logits_soft_cap,
    )[0]


def _prefill(
    params: Params, config: ModelConfig, tokens: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, Cache]:
    """Reads the prompts. Returns the hidden state of each last token, [P, D], and the filled cache."""
    prompts, columns = tokens.shape
    column = jnp.arange(columns)[None]
    first = columns - lengths[:, None]
    positions = jnp.maximum(column - first, 0)
    mask = (column <= column.T)[None] & (column >= first)[:, None, :]
    empty = init_cache(config, prompts, columns)
    hidden, cache = forward_cached(params, config, tokens, positions, mask[:, None], empty, 0)
    return hidden[:, -1], cache


def _widen(cache: jax.Array, columns: int) -> jax.Array:
    """Appends empty columns, [N, B, K, S, Dh]."""
    return jnp.pad(cache, ((0, 0), (0, 0), (0, 0), (0, columns), (0, 0)))


def sample_token(
    logits: jax.Array, keys: jax.Array, sampling: SamplingParams
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Draws one token a row and tells how likely it was.

    The log-probability is that of the distribution sampled from: after temperature, top-k and top-p, and
    renormalized. A greedy choice (temperature 0) is certain, so the model's own log-probability is told instead.

    Args:    logits: [B, V] float32; keys: [B] random keys.
    Returns: tokens [B] int32, log-probabilities [B] float32, and which tokens could be drawn, [B, ceil(V / 32)]
        uint32, or None: all, or it was a greedy choice.
    """
    drawable = None
    if sampling.temperature == 0:
        token = _argmax(logits)
    else:
        logits = truncate(logits / sampling.temperature, sampling)
        if sampling.is_cut:
            drawable = pack_bits(logits > -jnp.inf)
        token = _argmax(logits + gumbel_noise(keys, logits.shape[1]))  # Gumbel-max: a draw from the softmax
    chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
    return token, chosen - jax.nn.logsumexp(logits, axis=-1), drawable


def gumbel_noise(keys: jax.Array, size: int) -> jax.Array:
    """Gumbel noise, [B, size] float32, for [B] random keys.

    With its whole tail: JAX's default ends at 16.6, and tokens of a probability below 1e-6 are drawn too rarely.
    """
    return jax.vmap(lambda key: jax.random.gumbel(key, (size,), jnp.float32, mode="high"))(keys)


def _argmax(x: jax.Array) -> jax.Array:
    """Column of the largest value of each row, the first of equals: [B, V] -> [B] int32.

    Two plain reductions, which every backend vectorizes; XLA's CPU backend does not vectorize `jnp.argmax`.
    """
    columns = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    is_largest = x == jnp.max(x, axis=1, keepdims=True)
    return jnp.min(jnp.where(is_largest, columns, x.shape[1] - 1), axis=1)


def truncate(logits: jax.Array, sampling: SamplingParams) -> jax.Array:
    """Sets to -inf what top-k, and then top-p among what is left, exclude. [B, V]."""
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probs = jax.nn.softmax(ordered, axis=-1)
        # The smallest set that reaches top_p: a token stays if those before it do not reach it.
        kept = jnp.cumsum(probs, axis=-1) - probs < sampling.top_p
        least = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits
