"""Summaries for a person: batch sizes at the start of a run, report and learning curve at its end."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo_jax.config import Config
from grpo_jax.learner.packing import micro_batch_shape
from grpo_jax.rollout.base import one_line
from grpo_jax.rollout.evaluation import read_jsonl
from grpo_jax.run.evaluation_command import evaluation_command
from grpo_jax.run.speed import Speed, steady
from grpo_jax.run.workdir import Workdir
from grpo_jax.run.writer import read_metrics

logger = logging.getLogger(__name__)

NUM_PROBLEMS = 3
ROLES = "(system|developer|user|assistant|model|tool)"
TURN = re.compile(
    rf"(?:<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|<\|(?=\w+\|>)){ROLES}(?:<\|end_header_id\|>|\|>|\n)"
)
"""The beginning of a turn in the templates of the supported families."""
MARKER = re.compile(r"<\|[^<>|]*\|>|<(?:end|start)_of_turn>|</?s>|<[be]os>|\[/?INST\]")
TYPICAL_WEIGHT = 0.02
"""The standard deviation that the families of models here are initialized with."""
LOST_BELOW = 2.0**-8 * TYPICAL_WEIGHT
"""7.8e-5, the learning rate from which on bfloat16 parameters take up what Adam gives them, about the learning
rate itself. With 8 significant bits the neighbours of a weight are 2^-8 to 2^-7 of it away, and a change of less
than half of that, 2^-8 at most, is rounded away."""


def print_report(config: Config, workdir: Workdir, model: Path, speed: Speed, first_step: int) -> None:
    """Draws the learning curve and prints what changed, where everything is and what to do next.

    Args: first_step: after which this process began, for what is compared with `speed`.
    """
    lines = read_metrics(workdir)
    draw_learning_curve(lines, workdir.learning_curve)
    accuracies = [(line["step"], line["val/accuracy"]) for line in lines if "val/accuracy" in line]
    logger.info("\nDone: %d steps.", lines[-1]["step"])
    if len(accuracies) > 1:
        (first, early), (last, late) = accuracies[0], accuracies[-1]
        how = "greedy" if config.eval.temperature == 0 else f"temperature {config.eval.temperature:g}"
        when = [_when(step, lines[-1]["step"]) for step in (first, last)]
        logger.info("Accuracy on held-out problems (%s): %.1f %% %s, %.1f %% %s.",
                    how, 100 * early, when[0], 100 * late, when[1])  # fmt: skip
        _print_problems(workdir, {first: when[0], last: when[1]}, config.eval.num_samples)
    elif accuracies:
        logger.info("Accuracy on held-out problems: %.1f %%.", 100 * accuracies[0][1])
    for row in speed.compared(steady(lines, first_step)):
        logger.info(row)
    logger.info("Learning curve:  %s", workdir.learning_curve)
    logger.info("The run's page:  %s", workdir.report)
    if "tensorboard" in config.logging.loggers:
        logger.info("TensorBoard:     tensorboard --logdir %s", workdir.tensorboard)
    logger.info("Trained model:   %s   (a %s folder)", model, "PEFT" if config.lora.rank else "Hugging Face")
    last_validation = accuracies[-1][0] if accuracies else lines[-1]["step"]
    logger.info("Evaluate it:     %s", evaluation_command(config, workdir, model, last_validation))
    if config.arithmetic.num_train:
        logger.info(
            "Next, on a GPU:  pip install -e '.[gpu,vllm]', then train a real model on GSM8K:\n"
            "                 python -m grpo_jax.data.gsm8k --local_dir=data/gsm8k\n"
            "                 hf download Qwen/Qwen2.5-0.5B-Instruct --local-dir models/Qwen2.5-0.5B-Instruct\n"
            "                 python -m grpo_jax.train --config=configs/gsm8k.py "
            "--config.model.path=models/Qwen2.5-0.5B-Instruct"
        )


def _when(step: int, last_step: int) -> str:
    """When a validation was, seen from the training: the first of a run need not have been before it."""
    return {0: "before", last_step: "after"}.get(step, f"after step {step}")


def draw_learning_curve(lines: list[dict[str, Any]], path: Path) -> None:
    """Reward of the sampled completions and accuracy on held-out problems against the step, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=150)
    for name, label, style in (
        ("reward/mean", "mean reward, sampled", dict(color="tab:blue", alpha=0.7)),
        ("val/accuracy", "held-out accuracy", dict(color="tab:red", marker="o")),
    ):
        points = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    axes.set_xlabel("step")
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))  # the chosen limit, a margin below the curves
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def _print_problems(workdir: Workdir, when: dict[int, str], num_samples: int) -> None:
    """Three held-out problems with an early and a late completion; those that changed come first.

    Args: when: step -> in words, of both validations.
    """
    before, after = (_read_validation(workdir, step)[::num_samples] for step in when)
    labels = [f"{words}:" for words in when.values()]
    width = max(map(len, labels))
    pairs = sorted(zip(before, after, strict=False), key=lambda pair: pair[0]["reward"] - pair[1]["reward"])
    for old, new in pairs[:NUM_PROBLEMS]:
        logger.info("\n  %s  (answer: %s)", _question(old["prompt"]), old["ground_truth"])
        for label, record in zip(labels, (old, new), strict=True):
            logger.info("    %s %s", label.ljust(width), one_line(record["completion"]))
    logger.info("")


def _read_validation(workdir: Workdir, step: int) -> list[dict[str, Any]]:
    path = workdir.validation / f"step-{step:06d}.jsonl"
    return read_jsonl(path) if path.exists() else []


def _question(prompt: str) -> str:
    """What the user of a chat says last, without the template's markers; of other prompts, all. On one line."""
    _, *turns = TURN.split(prompt)
    asked = [text for role, text in zip(turns[::2], turns[1::2], strict=True) if role == "user"]
    return one_line(MARKER.sub(" ", asked[-1] if asked else prompt))


def batch_table(config: Config, *, num_data_shards: int, steps_per_epoch: int) -> list[tuple[str, str]]:
    """The batch sizes that follow from the configuration, to be printed at the start: (name, value) rows."""
    data, actor = config.data, config.actor
    num_completions = config.completions_per_update
    rows, length = micro_batch_shape(config, num_completions, num_data_shards)
    most = -(-num_completions // rows)
    most_tokens = config.completions_per_step * (data.max_prompt_length + data.max_response_length)
    return [
        ("prompts per step", f"{data.train_batch_size:,}"),
        ("completions per step", f"{config.completions_per_step:,} ({config.algorithm.group_size} a prompt)"),
        (
            "updates per step",
            f"{config.updates_per_step} (mini-batches: {actor.num_minibatches}, passes: {actor.num_epochs})",
        ),
        ("completions per update", f"{num_completions:,}"),
        (
            "micro-batches per update",
            f"at most {most}, of {rows // num_data_shards} packed rows of {length:,} tokens on each of "
            f"{num_data_shards} data shards",
        ),
        ("tokens per step, at most", f"{most_tokens:,}"),
        ("steps per epoch", f"{steps_per_epoch:,}"),
        ("steps in all", f"{config.num_steps(steps_per_epoch):,}"),
    ]


def doubts(config: Config, num_steps: int) -> list[str]:
    """What the configuration says and hardly means, one line each. Args: num_steps: of the whole run."""
    optim, updates, lines = config.optim, num_steps * config.updates_per_step, []
    if optim.warmup_steps > updates:
        share = updates / optim.warmup_steps
        lines.append(
            f"WARNING: optim.warmup_steps={optim.warmup_steps} is beyond the {updates} updates of this run: the "
            f"learning rate ends at {share:.0%} of optim.learning_rate={optim.learning_rate:g}"
        )
    if config.model.param_dtype == "bfloat16" and optim.learning_rate < LOST_BELOW:
        lines.append(
            f"WARNING: optim.learning_rate={optim.learning_rate:g} is below {LOST_BELOW:.2g}: parameters "
            "with model.param_dtype=bfloat16, which has 8 bits, lose most such updates in rounding; take float32"
        )
    return lines


def table_lines(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Two columns, (name, value) a line."""
    width = max(len(name) for name, _ in rows)
    return [f"  {name.ljust(width)}  {value}" for name, value in rows]
