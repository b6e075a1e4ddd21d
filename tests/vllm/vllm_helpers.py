"""Tiny models, engines over them, and what transformers says: for the tests with the real vLLM."""

import contextlib
import functools
import os
import pathlib
import signal
import time

import jax
import numpy as np
import torch
from tiny_models import tiny_torch_model
from transformers import AutoModelForCausalLM

from grpo_jax.config import MeshSection, RolloutSection
from grpo_jax.model.hf import ModelFolder, inspect_folder, load_params
from grpo_jax.model.sharding import make_mesh
from grpo_jax.rollout import SamplingParams, make_engine
from grpo_jax.types import Prompt

IS_GPU = os.environ.get("GRPO_JAX_TEST_GPU") == "1"
"""Set where the tests run on a GPU host; otherwise they run with vLLM's build for CPUs."""

if IS_GPU:
    jax.config.update("jax_default_matmul_precision", "highest")  # float32 as vLLM computes it, not TF32

# vLLM's CPU attention knows heads of 32 and wider; 520 rows leave the vocabulary's padding to 576 to be seen.
SIZES = dict(
    vocab_size=520,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=1024,
    initializer_range=0.15,
    bos_token_id=None,
    eos_token_id=2,
    pad_token_id=0,
)
FAMILIES = {
    "qwen2-tied": ("qwen2", dict(SIZES, tie_word_embeddings=True)),
    "qwen2-untied": ("qwen2", dict(SIZES, tie_word_embeddings=False)),
    # Made for 128 positions, and run beyond them, as model.allow_beyond_max_position lets a run do.
    "qwen3": ("qwen3", dict(SIZES, head_dim=32, tie_word_embeddings=False, max_position_embeddings=128)),
    "llama3": ("llama", dict(SIZES, head_dim=32, tie_word_embeddings=False)),
}
STOP = 2
TOLERANCE = 3e-2 if IS_GPU else 1e-3
"""Of log-probabilities against transformers on a CPU in float32; on a GPU vLLM uses TF32 (8e-3 seen)."""


def make_model(folder, family, seed=0):
    """Writes a random model, biases and norms random too, so that no tensor is like another."""
    return write_model(folder, *FAMILIES[family], seed=seed)


def write_model(folder, kind, fields, seed=0):
    """As `make_model`. Args: kind: of `tiny_models.FAMILIES`; fields: of config.json."""
    model = tiny_torch_model(kind, seed=seed, scale=None, **fields)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder


class NumberTokenizer:
    """Stands where the engine decodes completions: each id as a number."""

    eos_token_id = STOP
    pad_token_id = 0

    def batch_decode(self, rows, skip_special_tokens):
        return [" ".join(map(str, row)) for row in rows]


def section(**changes):
    """The `rollout` section for a tiny model."""
    tiny = dict(
        max_num_seqs=64,
        enforce_eager=True,
        gpu_memory_utilization=0.1,
        bucket_mb=1,
        timeout_s=600.0,  # on a slow machine that does other things too
        start_timeout_s=1800.0,
    )
    return RolloutSection(**(tiny | changes))


def mesh_of(data=1, fsdp=1, tensor=1):
    devices = jax.devices()[: data * fsdp * tensor]
    return make_mesh(MeshSection(data, fsdp, tensor), devices)


def load(folder, mesh, dtype=np.float32):
    """(inspected folder, parameters on the mesh)"""
    inspected = inspect_folder(folder).with_config(dtype=np.dtype(dtype))
    return inspected, load_params(inspected, inspected.config, mesh)


def engine_for(folder, mesh, *, max_model_len=512, lora_push="merged", **changes):
    """Args: folder: a path, or what `inspect_folder` gives."""
    return make_engine(
        section(**changes),
        folder=folder if isinstance(folder, ModelFolder) else inspect_folder(folder),
        mesh=mesh,
        tokenizer=NumberTokenizer(),
        max_model_len=max_model_len,
        lora_push=lora_push,
    )


def pids(engine):
    """Process ids of the engines of a `VllmEngine`."""
    return [replica.pid for replica in engine._replicas]


def command_line(pid):
    """What a process was started as, or has renamed itself to; b"" where it is gone."""
    with contextlib.suppress(OSError):
        return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def wait_for_tokens(engine, count):
    """Returns when rollouts under way have about so many tokens: as many as one that was asked for now."""
    engine.generate(prompts([10], seed=99), SamplingParams(1, 1.0, count), seed=0)


def kill_midway(engine, pid):
    """Kills an engine when the first group of the batch under way has come back. Run it in a thread."""
    (pending,) = engine._pending
    while not pending._groups:
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)


def perturbed(params, seed, scale=0.05):
    """Parameters after a "training step": every leaf moved at random, where it lies."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    move = jax.jit(lambda x, key: x + scale * jax.random.normal(key, x.shape, x.dtype))
    return jax.tree.unflatten(tree, [move(x, key) for x, key in zip(leaves, keys, strict=True)])


def prompts(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Prompt(f"test/{i}", tuple(int(t) for t in rng.integers(3, 520, n)), "", "", "test", {})
        for i, n in enumerate(lengths)
    ]


@functools.cache
def _reference(folder):
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def reference(folder):
    """transformers' model of a folder."""
    return _reference(str(folder))


@torch.no_grad()
def reference_logprobs(model, prompt, completion, temperature=1.0):
    """log p of each completion token by transformers, [len(completion)] float32."""
    ids = torch.tensor([[*prompt, *completion]])
    logprobs = torch.log_softmax(model(ids).logits[0].float() / temperature, dim=-1)
    at = torch.arange(len(prompt) - 1, len(prompt) + len(completion) - 1)
    return logprobs[at, torch.tensor(list(completion))].numpy()


@torch.no_grad()
def reference_greedy(model, prompt, max_tokens, stop=STOP):
    """Greedy token ids by transformers, one at a time, the stop token included. stop: None: there is none."""
    ids = list(prompt)
    for _ in range(max_tokens):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == stop:
            break
    return tuple(ids[len(prompt) :])


def check_greedy(groups, model, expected):
    """That the only completion of each group is greedy: on a CPU, equal to `expected`, by `reference_greedy`.

    On a GPU rounding decides between tokens that are all but equal: each is as likely as the likeliest.
    """
    found = [group.completions[0].token_ids for group in groups]
    if not IS_GPU:
        assert found == expected
        return
    for group, tokens, likeliest in zip(groups, found, expected, strict=True):
        prompt = group.prompt.token_ids
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].float()
        chosen = logits.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert float((logits.max(dim=-1).values - chosen).max()) < TOLERANCE
        assert len(tokens) == len(likeliest) or STOP in (tokens[-1], likeliest[-1])


def worst_difference(groups, model, temperature=1.0):
    """Largest |log p_engine - log p_transformers| over all completion tokens."""
    return max(
        float(np.abs(np.array(c.sampler_logprobs)
                     - reference_logprobs(model, g.prompt.token_ids, c.token_ids, temperature)).max())
        for g in groups
        for c in g.completions
    )  # fmt: skip


def moved(folder, mesh, tmp_path):
    """(parameters, transformers' model of them) that differ from those of the folder."""
    inspected, params = load(folder, mesh)
    params = perturbed(params, seed=5)
    return params, reference(save_as_folder(params, inspected.config, folder, tmp_path / "moved"))


def save_as_folder(params, config, source, target):
    """The parameters as a Hugging Face folder that transformers can load."""
    from grpo_jax.model.hf import save_folder

    save_folder(target, params, config, files_from=source, dtype="F32")
    return target
