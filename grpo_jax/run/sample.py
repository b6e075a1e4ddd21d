"""A few greedy tokens from a model's folder, to see that it is whole and speaks."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from grpo_jax.config import Config, RolloutSection
from grpo_jax.data.prompts import encode_prompts
from grpo_jax.learner.optimizer import read_leaf
from grpo_jax.model.hf import inspect_folder, verify_weights
from grpo_jax.rollout import SamplingParams, make_engine, shares_parameters
from grpo_jax.run.devices import open_devices
from grpo_jax.run.inputs import check_weights, first_params, load_model_tokenizer
from grpo_jax.types import Params, Prompt, RolloutGroup

QUESTION = "What is the capital of France?"
MAX_PROMPT = 1024
LOCAL = dataclasses.replace(Config().rollout, engine="local", batch_size=1)


@dataclasses.dataclass(frozen=True)
class Sample:
    """What a model says."""

    prompt: str
    """As the chat template has it."""
    answer: str
    difference: float | None
    """Mean |log p_engine - log p_trainer| of the answer's tokens, nats; None: the trainer's own engine sampled."""


def greedy_sample(path: str | Path, *, num_tokens: int, dtype: str, engine: RolloutSection = LOCAL) -> Sample:
    """Loads a folder as a run does, gives the engine its weights, and asks it `QUESTION`.

    Args:
        num_tokens: of the answer, at most; dtype: of the computation.
        engine: that samples, on this process's devices.

    Raises:
        ConfigError: the folder is not complete, not supported, or holds numbers that are not finite.
        EngineError, WeightSyncError: the engine does not start, or does not get the weights.
    """
    config = _config(str(path), dtype, engine)
    folder = inspect_folder(path, config.model)
    tokenizer = load_model_tokenizer(folder)
    prompt = _prompt(tokenizer)
    verify_weights(path)
    mesh = open_devices(config, folder.config, engine=engine)
    length = len(prompt.token_ids) + num_tokens + 1  # vLLM scores given tokens by sampling one more
    arguments = dict(folder=folder, mesh=mesh, tokenizer=tokenizer, max_model_len=length)
    with contextlib.closing(make_engine(engine, **arguments)) as speaker:
        params = jax.tree.map(read_leaf, first_params(config, folder, folder.config, mesh))
        check_weights(params, folder.path)
        speaker.load_weights(params, version=0)
        (group,) = speaker.submit([prompt], SamplingParams(1, 0.0, num_tokens), seed=0)()
        theirs = [] if shares_parameters(engine) else speaker.score([group], temperature=1.0)
    difference = None
    if theirs:
        difference = float(np.abs(theirs[0] - _own_scores(arguments, params, group)).mean())
    return Sample(prompt.text, group.completions[0].text, difference)


def _own_scores(arguments: dict[str, Any], params: Params, group: RolloutGroup) -> np.ndarray:
    """The trainer's log-probabilities of the tokens, float32."""
    with contextlib.closing(make_engine(LOCAL, **arguments)) as own:
        own.load_weights(params, version=0)
        return own.score([group], temperature=1.0)[0]


def _prompt(tokenizer: Any) -> Prompt:
    chat = [{"role": "user", "content": QUESTION}]
    row = {
        "prompt_id": "sample/0",
        "prompt": chat if tokenizer.chat_template else QUESTION,
        "data_source": "sample",
        "reward_model": {"ground_truth": ""},
        "extra_info": {},
    }
    prompts, _ = encode_prompts(
        [row], tokenizer, max_prompt_length=MAX_PROMPT, overlong="truncate", key="sample"
    )
    return prompts[0]


def _config(path: str, dtype: str, engine: RolloutSection) -> Config:
    base, replace = Config(), dataclasses.replace
    return replace(
        base,
        model=replace(base.model, path=path, dtype=dtype, param_dtype="float32"),
        optim=replace(base.optim, offload=False),
        rollout=engine,
    )
