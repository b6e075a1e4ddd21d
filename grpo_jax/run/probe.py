"""Compares what engine and trainer compute with the same weights."""

import dataclasses
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from grpo_jax.learner.batching import make_train_batch
from grpo_jax.rollout.base import RolloutEngine, SamplingParams
from grpo_jax.types import Params, Prompt, TrainBatch
from grpo_jax.weight_sync.wire import WeightSyncError

logger = logging.getLogger(__name__)

PROBE_PROMPTS = 4
PROBE_TOKENS = 32
PROBE_SEED = 20261124


@dataclasses.dataclass(frozen=True)
class Probe:
    """A few fixed prompts, completed by the engine with a fixed seed and scored again by the trainer.

    Checksums show that the weights are the same; this shows that both do the same with them.
    """

    prompts: Sequence[Prompt]
    sampling: SamplingParams
    score: Callable[[Params, TrainBatch], np.ndarray]
    """(parameters, host batch [B, T]) -> the trainer's log-probabilities [B, T]."""
    threshold: float
    """Largest mean of |log p_trainer - log p_engine| over the tokens."""
    pad_id: int

    def __call__(self, engine: RolloutEngine, params: Params) -> float:
        """Returns the mean difference, nats a token.

        Raises: WeightSyncError: it is over the threshold; names what may differ.
        """
        differences = self._differences(self.prompts, engine, params)
        mean = float(differences.mean())
        logger.info("engine and trainer differ by %.2g nats a token (%d tokens)", mean, differences.size)
        if not mean <= self.threshold:
            raise WeightSyncError(
                f"engine and trainer differ by {mean:.3g} nats a token on {differences.size} tokens "
                f"(rollout.probe_threshold={self.threshold:g}), although the weights are the same: "
                f"{self._suspect(engine, params)}"
            )
        return mean

    def _differences(self, prompts: Sequence[Prompt], engine: RolloutEngine, params: Params) -> np.ndarray:
        """|log p_trainer - log p_engine| of each token of the completions, [number of tokens] float32."""
        groups = engine.generate(prompts, self.sampling, seed=PROBE_SEED)
        batch = make_train_batch(groups, pad_id=self.pad_id)
        mask = np.asarray(batch.completion_mask) > 0
        return np.abs(self.score(params, batch) - np.asarray(batch.sampler_logprobs))[mask]

    def _suspect(self, engine: RolloutEngine, params: Params) -> str:
        """What explains the difference best."""
        # Without their first token the same prompts are new to a prefix cache, which goes by whole beginnings.
        fresh = [dataclasses.replace(p, token_ids=p.token_ids[1:] or p.token_ids) for p in self.prompts]
        if self._differences(fresh, engine, params).mean() <= self.threshold:
            return "prompts that it has not seen agree, so the engine's prefix cache holds values of older weights"
        return (
            "model.dtype, rollout.engine_args (quantization, dtype, hf_overrides), rope or norm settings in "
            "config.json, or a version of vLLM that computes this model differently"
        )


def make_probe(
    prompts: Sequence[Prompt], sampling: SamplingParams, score: Any, *, threshold: float, pad_id: int
) -> Probe:
    """A probe at the temperature of the rollouts, one short completion a prompt.

    Without top-p and top-k: what they cut off is a difference that was asked for.
    """
    sampling = SamplingParams(1, sampling.temperature, min(PROBE_TOKENS, sampling.max_tokens))
    return Probe(tuple(prompts[:PROBE_PROMPTS]), sampling, score, threshold, pad_id)
