"""A few greedy tokens from a model's folder, to see that it is whole and speaks."""

import dataclasses
from pathlib import Path

import jax

from grpo_jax.config import Config
from grpo_jax.data.prompts import encode_prompts
from grpo_jax.learner.optimizer import read_leaf
from grpo_jax.model.hf import inspect_folder, verify_weights
from grpo_jax.rollout import SamplingParams, make_engine
from grpo_jax.run.devices import open_devices
from grpo_jax.run.inputs import check_weights, first_params, load_model_tokenizer

QUESTION = "What is the capital of France?"
MAX_PROMPT = 1024


def greedy_sample(path: str | Path, *, num_tokens: int, dtype: str) -> tuple[str, str]:
    """Loads a folder as a run does, and asks it `QUESTION` by the local engine on this process's devices.

    Args:    num_tokens: of the answer, at most; dtype: of the computation.
    Returns: the prompt, as the chat template has it, and the answer.
    Raises:  ConfigError: the folder is not complete, not supported, or holds numbers that are not finite.
    """
    config = _config(str(path), dtype)
    folder = inspect_folder(path, config.model)
    tokenizer = load_model_tokenizer(folder)
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
    verify_weights(path)
    mesh = open_devices(config, folder.config, engine=config.rollout)
    length = len(prompts[0].token_ids) + num_tokens
    engine = make_engine(config.rollout, folder=folder, mesh=mesh, tokenizer=tokenizer, max_model_len=length)
    params = jax.tree.map(read_leaf, first_params(config, folder, folder.config, mesh))
    check_weights(params, folder.path)
    engine.load_weights(params, version=0)
    (group,) = engine.submit(prompts, SamplingParams(1, 0.0, num_tokens), seed=0)()
    return prompts[0].text, group.completions[0].text


def _config(path: str, dtype: str) -> Config:
    base, replace = Config(), dataclasses.replace
    return replace(
        base,
        model=replace(base.model, path=path, dtype=dtype, param_dtype="float32"),
        optim=replace(base.optim, offload=False),
        rollout=replace(base.rollout, engine="local", batch_size=1),
    )
