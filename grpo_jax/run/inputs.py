"""All that a run reads, checked before a device is touched; then what the configuration asks to be made.

`read_inputs` only reads. `make_model` may write (a random model, generated problems, a warm start), and does
it once: a run that goes on finds what it made the first time.
"""

import dataclasses
import datetime
import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from grpo_jax.algorithm import load_algorithm
from grpo_jax.config import Config, ConfigError
from grpo_jax.data import arithmetic
from grpo_jax.data.prompts import encode_prompts, fingerprint, load_tokenizer, sft_examples
from grpo_jax.data.schema import check_rows, read_rows
from grpo_jax.model import random_model
from grpo_jax.model.config import RANDOM_MAX_POSITION, ModelConfig, parse_hf_config, random_model_config
from grpo_jax.model.experts import choose_experts
from grpo_jax.model.fused_attention import DeviceKind, choose_kernel, local_device_kind, mesh_device_kind
from grpo_jax.model.hf import ModelFolder, inspect_folder, param_readers, read_json
from grpo_jax.model.lora import init_adapters, join
from grpo_jax.model.peft import adapter_readers, inspect_adapter, read_adapter_config, with_adapters
from grpo_jax.model.rope import max_position
from grpo_jax.rewards import check_names
from grpo_jax.run.hosts import ALONE, Hosts
from grpo_jax.run.trackers import check_trackers
from grpo_jax.run.warm_start import warm_start
from grpo_jax.run.workdir import Beginning, OtherRun, Workdir
from grpo_jax.types import Params, Prompt

logger = logging.getLogger(__name__)


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
    beginning: Beginning
    """Of the run: as its workdir has it, or as it is now."""

    @property
    def model_config(self) -> ModelConfig | None:
        return self.model.config if self.model else None


def read_model_config(config: Config, kind: DeviceKind | None = None) -> ModelConfig:
    """The model of the run from its config.json alone, with the kernels that a device would take.

    Args:   kind: of a device that need not be here; None: the devices at hand.
    Raises: ConfigError: model.path holds no config.json that is understood, sequences are longer than the model
            was made for, or the device lacks the kernel.
    """
    if config.model.path == "random":
        model = random_model_config(config.random_model, config.model)
        limit: int | None = RANDOM_MAX_POSITION
    else:
        content = read_json(Path(config.model.path) / "config.json")
        model = parse_hf_config(content, config.model)
        limit = max_position(content)
    _check_lengths(config, limit, model.can_extrapolate)
    kind = kind or local_device_kind()
    _check_push(config, kind)
    kernels = _kernels(config, model, kind)
    return with_adapters(dataclasses.replace(model, **kernels), config.lora)


def _kernels(config: Config, model: ModelConfig, kind: DeviceKind) -> dict[str, Any]:
    attention = choose_kernel(config.model.attention, model.dtype, model.head_dim, kind, any(model.windows))
    return dict(attention=attention, experts=choose_experts(config.model.experts, model, kind))


def _check_push(config: Config, kind: DeviceKind) -> None:
    has_alone = config.lora.rank and config.lora.push == "adapter"
    if has_alone and config.model.dtype == "float32" and kind.platform == "cuda":
        rule = (
            "needs model.dtype=bfloat16 or float16 on GPUs, as vLLM's kernels for adapters do: choose merged"
        )
        raise ConfigError("lora.push", "adapter", rule)


def check_workdir(config: Config, workdir: Workdir) -> None:
    """`Workdir.check`, where a name that leads nowhere comes before a difference from the run that is there.

    Raises: ConfigError: as `Workdir.check`; or a file, folder or function that is named is not there.
    """
    try:
        workdir.check(config)
    except OtherRun:
        check_names(config.reward)
        load_algorithm(config)
        _read_rows(config)
        if config.model.path != "random":
            inspect_folder(config.model.path, config.model)
        if config.lora.path:
            read_adapter_config(Path(config.lora.path))
        raise


def read_inputs(config: Config, workdir: Workdir, hosts: Hosts = ALONE) -> Inputs:
    """Reads and checks every file that the run needs.

    Raises: ConfigError: the first thing that is wrong.
    """
    if hosts.is_first:  # the others write no reports
        check_trackers(config.logging.loggers)
    rows, generated = _read_rows(config)
    folder, tokenizer = _read_model(config, workdir, rows)
    _check_model(config, folder)
    held = workdir.read_beginning(is_forced=config.checkpoint.resume == "force")
    now = lambda: datetime.datetime.now().replace(microsecond=0).isoformat()
    date = held.date if held else datetime.datetime.fromisoformat(hosts.from_first(now))
    prompts = _encode(config, rows, tokenizer, date)
    beginning = Beginning(date, fingerprint(prompts["train"]))
    if held:
        workdir.check_prompts(config, held, beginning.prompts)
    examples: list[tuple[list[int], list[int]]] = []
    if config.sft.num_steps:
        limits = (config.data.max_prompt_length, config.data.max_response_length)
        examples, dropped = sft_examples(
            rows["sft"], tokenizer, *limits, date, config.data.chat_template_args
        )
        logger.info("sft.train_files: %d examples (%d too long, dropped)", len(examples), dropped)
    if len(prompts["train"]) < config.data.train_batch_size:
        rule = f"must be at most the number of training prompts, {len(prompts['train'])}"
        raise ConfigError("data.train_batch_size", config.data.train_batch_size, rule)
    val_prompts = prompts["val"][: config.eval.num_prompts or None]
    return Inputs(tokenizer, prompts["train"], val_prompts, examples, folder, generated, beginning)


def _encode(
    config: Config, rows: dict[str, Any], tokenizer: Any, date: datetime.datetime
) -> dict[str, list[Prompt]]:
    """The training and the validation prompts, by split. Args: date: as in `encode_prompts`."""
    prompts = {}
    for split, key in (("train", "data.train_files"), ("val", "data.val_files")):
        prompts[split], counts = encode_prompts(
            rows[split],
            tokenizer,
            max_prompt_length=config.data.max_prompt_length,
            overlong=config.data.overlong_prompts,
            key=key,
            date=date,
            template_args=config.data.chat_template_args,
        )
        logger.info(
            "%s: %d prompts (%d longer than %d tokens filtered, %d truncated)",
            key, len(prompts[split]), counts.num_filtered, config.data.max_prompt_length, counts.num_truncated,
        )  # fmt: skip
    return prompts


def make_model(
    config: Config, inputs: Inputs, workdir: Workdir, mesh: Mesh, hosts: Hosts = ALONE
) -> ModelFolder:
    """The folder that GRPO starts from: as given, or made at random, and warm-started where configured.

    Its configuration has the run's adapters; a warm start trains all parameters, without any.
    """
    folder = _make_model(config, inputs, workdir, mesh, hosts)
    return dataclasses.replace(folder, config=with_adapters(folder.config, config.lora))


def _make_model(config: Config, inputs: Inputs, workdir: Workdir, mesh: Mesh, hosts: Hosts) -> ModelFolder:
    """See `make_model`; without adapters."""
    # Each of them: an older version may have been killed between two.
    if hosts.is_first and not all(
        path.exists() for path in arithmetic.split_paths(workdir.data, inputs.generated).values()
    ):
        arithmetic.write_splits(workdir.data, inputs.generated)
    if workdir.sft_model.exists() and config.sft.num_steps:
        return with_kernels(inspect_folder(workdir.sft_model, config.model), config, mesh)
    folder = inputs.model
    if folder is None:
        random_model.make_random_model(
            workdir.random_model, config.random_model, inputs.tokenizer, seed=config.trainer.seed, mesh=mesh
        )
        hosts.wait_for_all()  # the first one writes it
        folder = inspect_folder(workdir.random_model, config.model)
    folder = with_kernels(folder, config, mesh)
    if config.sft.num_steps:
        warm_start(config, folder, inputs.tokenizer, inputs.sft_examples, mesh, target=workdir.sft_model)
        hosts.wait_for_all()
        folder = with_kernels(inspect_folder(workdir.sft_model, config.model), config, mesh)
    return folder


def first_params(config: Config, folder: ModelFolder, model: ModelConfig, mesh: Mesh) -> Params:
    """A tree of the parameters that a run begins with: arrays, or functions that read them.

    Args: folder: as from `make_model`; model: its configuration, perhaps with another `trained_dtype`.
    """
    frozen = param_readers(folder, model, mesh)
    if model.lora is None:
        return frozen
    if config.lora.path:
        return join(frozen, adapter_readers(config.lora.path, model, mesh))
    return join(frozen, init_adapters(model, jax.random.key(config.trainer.seed), mesh))


def check_weights(params: Params, path: Path) -> None:
    """Raises: ConfigError: a parameter that was read from the folder PATH, now on devices, is not finite."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    finite = jax.jit(lambda arrays: [jnp.isfinite(array).all() for array in arrays])([x for _, x in leaves])
    for (name, _), is_finite in zip(leaves, jax.device_get(finite), strict=True):
        if not is_finite:
            where = jax.tree_util.keystr(name, simple=True, separator="/")
            raise ConfigError(
                "model.path", str(path), f"its parameter {where} holds a number that is not finite"
            )


def with_kernels(folder: ModelFolder, config: Config, mesh: Mesh) -> ModelFolder:
    """The model with the kernels that the devices of the mesh have."""
    return folder.with_config(**_kernels(config, folder.config, mesh_device_kind(mesh)))


def load_model_tokenizer(folder: ModelFolder) -> Any:
    """The tokenizer of a model's folder.

    Raises: ConfigError: it cannot be loaded, or has ids that the model has no embedding for.
    """
    tokenizer, vocab_size = load_tokenizer(folder.path), folder.config.vocab_size
    if len(tokenizer) > vocab_size:
        rule = f"its tokenizer has {len(tokenizer)} tokens, more than the model's vocab_size {vocab_size}"
        raise ConfigError("model.path", str(folder.path), rule)
    return tokenizer


def check_positions(
    limit: int | None, prompt: tuple[str, int], response: tuple[str, int], allow: str
) -> None:
    """Checks that prompt and response together are no longer than what the model was made for.

    Args:
        limit: `ModelFolder.max_position`.
        prompt, response: the key or flag that says how long it may be, and the tokens.
        allow: the setting that goes beyond the limit. "": nothing does (`ModelConfig.can_extrapolate`).

    Raises: ConfigError: they are longer.
    """
    total = prompt[1] + response[1]
    if limit is not None and total > limit:
        rule = f"makes {total} tokens with {prompt[0]}={prompt[1]}, beyond max_position_embeddings={limit} of the "
        rule += "model's config.json; "
        ends = "its kind of RoPE scaling ends there, and no setting goes beyond"
        rule += f"{allow} if its RoPE extrapolates so far" if allow else ends
        raise ConfigError(*response, rule)


def _check_model(config: Config, folder: ModelFolder | None) -> None:
    """Checks what the configuration asks of the model; None: a random one, still to be made.

    Raises: ConfigError: sequences longer than it was made for, or stop ids that are none of its tokens.
    """
    model = random_model_config(config.random_model, config.model) if folder is None else folder.config
    limit = RANDOM_MAX_POSITION if folder is None else folder.max_position
    _check_lengths(config, limit, model.can_extrapolate)
    _check_adapters(config, model, folder)
    vocab_size = model.vocab_size
    for stop in config.rollout.stop_token_ids:
        if not 0 <= stop < vocab_size:
            rule = f"must be from 0 to {vocab_size - 1}: the model's vocab_size is {vocab_size}"
            raise ConfigError("rollout.stop_token_ids", stop, rule)


def _check_adapters(config: Config, model: ModelConfig, folder: ModelFolder | None) -> None:
    """Raises: ConfigError: the model has no such adapters, or lora.path holds others."""
    model = with_adapters(model, config.lora)
    if config.lora.path:
        # After a warm start the base is another one, which is not there yet.
        inspect_adapter(config.lora.path, model, None if config.sft.num_steps else folder)


def _check_lengths(config: Config, limit: int | None, can_extrapolate: bool) -> None:
    """Args: limit, can_extrapolate: of the model. Raises: ConfigError: sequences may be longer."""
    data = config.data
    if not (config.model.allow_beyond_max_position and can_extrapolate):
        check_positions(
            limit,
            ("data.max_prompt_length", data.max_prompt_length),
            ("data.max_response_length", data.max_response_length),
            allow="model.allow_beyond_max_position=True" if can_extrapolate else "",
        )


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
    return folder, load_model_tokenizer(folder)


def _texts(row: dict[str, Any]) -> list[str]:
    """What a tokenizer for these rows should know: prompts and worked answers."""
    prompt = row["prompt"]
    texts = [prompt] if isinstance(prompt, str) else [message["content"] for message in prompt]
    return [*texts, str(row["extra_info"].get("answer", ""))]
