"""All that a run reads, checked before a device is touched; then what the configuration asks to be made.

`read_inputs` only reads. `make_model` may write (a random model, generated problems, a warm start), and does
it once: a run that goes on finds what it made the first time.
"""

import dataclasses
import logging
import math
import os
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from grpo_jax import sft
from grpo_jax.config import Config, ConfigError, RolloutSection, TrainerSection
from grpo_jax.data import arithmetic
from grpo_jax.data.prompts import encode_prompts, load_tokenizer, sft_examples
from grpo_jax.data.schema import check_rows, read_rows
from grpo_jax.learner.memory import what_is_held
from grpo_jax.model import random_model
from grpo_jax.model.config import ModelConfig
from grpo_jax.model.fused_attention import choose_kernel
from grpo_jax.model.hf import ModelFolder, inspect_folder
from grpo_jax.model.sharding import make_mesh
from grpo_jax.model.transformer import num_params
from grpo_jax.run.workdir import Workdir
from grpo_jax.types import Prompt

logger = logging.getLogger(__name__)

GIB = 2**30
JAX_HOST_LIMIT_GIB = 64
HOST_SLACK = 0.06
"""Of pinned memory: what lies idle between arrays of different sizes."""
STAGING_GIB = 2
"""Pinned memory that JAX copies through."""

CONTEXT_SHARE = 0.07
"""Of a GPU's memory: CUDA contexts, kernels and buffers for weights under way, which no pool counts."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a run was given, checked and encoded."""

    tokenizer: Any
    train_prompts: list[Prompt]
    val_prompts: list[Prompt]
    sft_examples: list[tuple[list[int], list[int]]]
    """(prompt ids, response ids); empty without a warm start."""
    model: ModelFolder | None
    """None: a random model, still to be made."""
    generated: dict[str, list[dict[str, Any]]]
    """Generated problems by split, still to be written; empty where files were read."""

    @property
    def model_config(self) -> ModelConfig | None:
        return self.model.config if self.model else None


def set_determinism(section: TrainerSection) -> None:
    """Makes XLA's GPU compiler choose kernels that always give the same bits; before any device is touched.

    Otherwise it times kernels and takes the quickest, another one each time, and adds in any order.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if section.deterministic and "xla_gpu_deterministic_ops" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()


def keep_compiled(section: TrainerSection) -> None:
    """Has JAX keep what it compiles for accelerators, for the next run with the same shapes.

    What the user set, as by JAX_COMPILATION_CACHE_DIR, stays. Programs for a CPU depend on its very model, compile
    quickly, and are better made anew.
    """
    if (
        section.compile_cache
        and not jax.config.values["jax_compilation_cache_dir"]
        and jax.default_backend() != "cpu"
    ):
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(section.compile_cache))


def share_gpus(section: RolloutSection) -> None:
    """Leaves vLLM its GPUs, or its part of their memory; before any device is touched.

    It is set in the environment, where JAX looks for it; what the user set there stays.
    """
    if section.engine == "local":
        return
    if section.placement == "separate":
        if not section.ray_address:  # the nodes of a cluster have GPUs of their own
            from grpo_jax.rollout.vllm.cluster import split_gpus

            ours, theirs = split_gpus(section)
            if theirs:
                os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(ours)
        return
    if section.sleep:
        # Both want most of the memory, one after the other: JAX must not keep what it does not need.
        os.environ.setdefault("XLA_PYTHON_CLIENT_ALLOCATOR", "cuda_async")
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{trainer_share(section):.3f}")


def trainer_share(section: RolloutSection) -> float:
    """The part of a GPU's memory that JAX may take in the run; its own default where no engine is beside it."""
    if section.engine == "local" or section.placement == "separate":
        return 0.75
    left = 1 if section.sleep else 1 - section.gpu_memory_utilization
    return max(0.05, left - CONTEXT_SHARE)


def make_room_on_host(config: Config, model: ModelConfig | None) -> None:
    """Lets JAX pin as much of the host's memory as `optim.offload` and `algorithm.ref_offload` need.

    Its own limit is 64 GB; as `share_gpus`, before any device is touched. The pool grows by doubling, up to the
    limit, so that more than what is needed would be taken from the other processes of the host.

    Args: model: None: a random one, which is small.
    """
    one = 0 if model is None else sum(what_is_held(config, model, num_params(model))[1].values())
    if not one:
        return
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed = one * max(1, config.mesh.data)
    if needed > there:
        text = "optim.offload and algorithm.ref_offload take %.0f GB of the host's memory, which has %.0f GB"
        logger.warning(text, needed / 1e9, there / 1e9)
    limit = math.ceil(needed * (1 + HOST_SLACK) / GIB) + STAGING_GIB
    if config.mesh.data == -1:  # as many copies as devices, which nobody has counted yet
        limit = there // GIB
    if limit > JAX_HOST_LIMIT_GIB:
        os.environ.setdefault("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", str(limit))


def read_inputs(config: Config, workdir: Workdir) -> Inputs:
    """Reads and checks every file that the run needs.

    Raises: ConfigError: the first thing that is wrong.
    """
    rows, generated = _read_rows(config)
    folder, tokenizer = _read_model(config, workdir, rows)
    prompts = {}
    for split, key in (("train", "data.train_files"), ("val", "data.val_files")):
        prompts[split], counts = encode_prompts(
            rows[split],
            tokenizer,
            max_prompt_length=config.data.max_prompt_length,
            overlong=config.data.overlong_prompts,
            key=key,
        )
        logger.info(
            "%s: %d prompts (%d longer than %d tokens filtered, %d truncated)",
            key, len(prompts[split]), counts.num_filtered, config.data.max_prompt_length, counts.num_truncated,
        )  # fmt: skip
    examples: list[tuple[list[int], list[int]]] = []
    if config.sft.num_steps:
        limits = (config.data.max_prompt_length, config.data.max_response_length)
        examples, dropped = sft_examples(rows["sft"], tokenizer, *limits)
        logger.info("sft.train_files: %d examples (%d too long, dropped)", len(examples), dropped)
    if len(prompts["train"]) < config.data.train_batch_size:
        rule = f"must be at most the number of training prompts, {len(prompts['train'])}"
        raise ConfigError("data.train_batch_size", config.data.train_batch_size, rule)
    val_prompts = prompts["val"][: config.eval.num_prompts or None]
    return Inputs(tokenizer, prompts["train"], val_prompts, examples, folder, generated)


def open_mesh(config: Config) -> Mesh:
    """The mesh of the run's devices.

    Raises: ConfigError: it does not fit them, or they cannot compute what is configured.
    """
    mesh = make_mesh(config.mesh)
    if mesh.shape["tensor"] > 1 and config.model.dtype == "bfloat16" and jax.default_backend() == "cpu":
        rule = "needs mesh.tensor=1 on CPUs: XLA's compiler for them fails at sums of bfloat16 over that axis"
        raise ConfigError("model.dtype", "bfloat16", rule)
    return mesh


def make_model(config: Config, inputs: Inputs, workdir: Workdir, mesh: Mesh) -> ModelFolder:
    """The folder that GRPO starts from: as given, or made at random, and warm-started where configured."""
    if inputs.generated and not workdir.data.exists():
        arithmetic.write_splits(workdir.data, inputs.generated)
    if workdir.sft_model.exists() and config.sft.num_steps:
        return _with_kernel(inspect_folder(workdir.sft_model, config.model), config)
    folder = inputs.model
    if folder is None:
        random_model.make_random_model(
            workdir.random_model, config.random_model, inputs.tokenizer, seed=config.trainer.seed, mesh=mesh
        )
        folder = inspect_folder(workdir.random_model, config.model)
    folder = _with_kernel(folder, config)
    if config.sft.num_steps:
        sft.warm_start(config, folder, inputs.tokenizer, inputs.sft_examples, mesh, target=workdir.sft_model)
        folder = _with_kernel(inspect_folder(workdir.sft_model, config.model), config)
    return folder


def _with_kernel(folder: ModelFolder, config: Config) -> ModelFolder:
    """The model with the attention kernel that these devices have. Looks at the devices."""
    model = folder.config
    return folder.with_config(attention=choose_kernel(config.model.attention, model.dtype, model.head_dim))


def check_tokenizer(tokenizer: Any, vocab_size: int, path: str | Path) -> None:
    """Raises: ConfigError: the tokenizer has ids that the model has no embedding for."""
    if len(tokenizer) > vocab_size:
        rule = f"its tokenizer has {len(tokenizer)} tokens, more than the model's vocab_size {vocab_size}"
        raise ConfigError("model.path", str(path), rule)


def _read_rows(config: Config) -> tuple[dict[str, list[dict[str, Any]]], dict[str, list[dict[str, Any]]]]:
    """Rows by split, and the generated ones among them."""
    section = config.arithmetic
    if section.num_train:
        generated = arithmetic.generate_splits(**dataclasses.asdict(section), seed=config.trainer.seed)
        rows = {
            split: check_rows(raw, name=split, source="arithmetic", key="arithmetic")
            for split, raw in generated.items()
        }
        return rows, generated
    files = {"train": "data.train_files", "val": "data.val_files"}
    rows = {split: read_rows(getattr(config.data, key.split(".")[1]), key) for split, key in files.items()}
    if config.sft.num_steps:
        rows["sft"] = read_rows(config.sft.train_files, "sft.train_files")
    return rows, {}


def _read_model(config: Config, workdir: Workdir, rows: dict[str, Any]) -> tuple[ModelFolder | None, Any]:
    """The model's folder, its headers checked, and the tokenizer."""
    is_random = config.model.path == "random"
    path = workdir.random_model if is_random else Path(config.model.path)
    if is_random and not path.exists():
        texts = [text for split in rows.values() for row in split for text in _texts(row)]
        return None, random_model.make_tokenizer(texts, config.random_model.vocab_size)
    folder = inspect_folder(path, config.model)
    tokenizer = load_tokenizer(path)
    check_tokenizer(tokenizer, folder.config.vocab_size, path)
    return folder, tokenizer


def _texts(row: dict[str, Any]) -> list[str]:
    """What a tokenizer for these rows should know: prompts and worked answers."""
    prompt = row["prompt"]
    texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
    return [*texts, str(row["extra_info"].get("answer", ""))]
