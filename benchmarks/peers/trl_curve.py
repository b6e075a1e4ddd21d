"""TRL's side of the learning curves: one run; writes OUTPUT/metrics.jsonl, by our names, and saves the model.

    python benchmarks/peers/trl_curve.py --model=DIR --data=FILE.parquet --output=DIR --settings='{...}'
        [--val_data=FILE.parquet --eval_every=20 --max_prompt_length=256]

The settings are those of our configuration, by TRL's names for the same thing. What stands here in words is where
the two would differ otherwise. With --val_data greedy accuracy is measured before the first step, after every
`eval_every` and at the end, by the engine that samples. SIGTERM ends the run after a step, with a checkpoint and
exit code 130; the same command goes on.
"""

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import trl
import trl_run  # noqa: F401, for the environment that it sets
from datasets import Dataset
from transformers import AutoTokenizer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

sys.path.append(str(Path(__file__).resolve().parents[2]))
from grpo_jax.rewards.gsm8k import compute_score  # standard library only

NAMES = {
    "reward": "reward/mean",
    "kl": "kl/mean",
    "grad_norm": "actor/grad_norm",
    "frac_reward_zero_std": "frac_reward_zero_std",
    "completions/mean_length": "response_length/mean",
}
"""What is kept of TRL's log, and our name for it."""
EVAL_ROWS = 64
"""Completions that transformers decodes at once where there is no vLLM."""


def main() -> None:
    args = parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    trainer = trl.GRPOTrainer(
        model=args.model,
        reward_funcs=reward,
        args=settings(args),
        train_dataset=Dataset.from_list(read_problems(args.data, tokenizer, args.max_prompt_length)),
        processing_class=tokenizer,
    )
    evaluate = None
    if args.val_data:
        problems = read_problems(args.val_data, tokenizer, args.max_prompt_length)
        evaluate = lambda: accuracy(trainer, tokenizer, problems)
    trainer.add_callback(Curve(Path(args.output) / "metrics.jsonl", evaluate, args.eval_every))
    trainer.train(resume_from_checkpoint=get_last_checkpoint(args.output))
    if trainer.state.global_step < trainer.state.max_steps:
        sys.exit(130)
    trainer.save_model(args.output)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for flag in ("--model", "--data", "--output", "--settings"):
        parser.add_argument(flag, required=True)
    parser.add_argument("--val_data", default="", help="held-out problems; none: no accuracy")
    parser.add_argument("--eval_every", type=int, default=0, help="steps; 0: before and after the run only")
    parser.add_argument(
        "--max_prompt_length", type=int, default=2**20, help="tokens; longer ones are left out"
    )
    args = parser.parse_args()
    Path(args.output).mkdir(parents=True, exist_ok=True)
    return args


def settings(args: argparse.Namespace) -> Any:
    values = dict(
        output_dir=args.output,
        loss_type="dapo",  # every token of the batch weighs the same: our token-mean
        scale_rewards="group",  # divided by the group's spread + 1e-4; ours + 1e-6
        num_iterations=1,
        lr_scheduler_type="constant",
        shuffle_dataset=False,  # both take the problems in the order of the file
        model_init_kwargs={"dtype": "float32"},
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        save_total_limit=1,
        report_to=[],
        disable_tqdm=True,
    )
    return trl.GRPOConfig(**values | json.loads(args.settings))


class Curve(TrainerCallback):
    """Writes a line a step, evaluates, and stops after a step where asked to."""

    def __init__(self, file: Path, evaluate: Callable[[], float] | None, every: int):
        self._file, self._evaluate, self._every = file, evaluate, every
        self._accuracy: dict[str, float] = {}
        self._must_stop = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        lines = self._file.read_text().splitlines() if self._file.exists() and state.global_step else []
        kept = [line for line in lines if json.loads(line)["step"] <= state.global_step]
        self._file.write_text("".join(f"{line}\n" for line in kept))
        if self._evaluate and not state.global_step:
            self._write(0, {"val/accuracy": self._evaluate()})
        signal.signal(signal.SIGTERM, self._note_stop)

    def _note_stop(self, *_: Any) -> None:
        self._must_stop = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        done = state.global_step
        is_due = done == state.max_steps or (self._every and done % self._every == 0)
        self._accuracy = {"val/accuracy": self._evaluate()} if self._evaluate and is_due else {}
        if self._must_stop and done < state.max_steps:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "reward" in (logs or {}):  # not the summary of the whole run
            numbers = {ours: logs[theirs] for theirs, ours in NAMES.items() if theirs in logs}
            self._write(state.global_step, numbers | self._accuracy)

    def _write(self, step: int, numbers: dict[str, float]) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        line = json.dumps({"step": step, "time": time.time(), **numbers})
        with self._file.open("a") as file:
            file.write(line + "\n")
        print(line, flush=True)


def accuracy(trainer: Any, tokenizer: Any, problems: list[dict[str, str]]) -> float:
    """Share of the problems that the policy answers correctly when it decodes greedily."""
    generate = greedy_vllm if trainer.args.use_vllm else greedy_transformers
    texts = generate(trainer, tokenizer, [problem["prompt"] for problem in problems])
    rewards = reward(texts, [problem["ground_truth"] for problem in problems])
    return sum(value == 1 for value in rewards) / len(rewards)


def greedy_vllm(trainer: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """By the colocated engine, with the policy's present weights."""
    engine = trainer.vllm_generation
    engine.sync_weights()
    temperature, engine.temperature = engine.temperature, 0.0
    try:
        completions = engine.generate(tokenizer(prompts)["input_ids"], None, 1)[1]
    finally:
        engine.temperature = temperature
    return list(tokenizer.batch_decode([list(ids) for ids in completions], skip_special_tokens=True))


def greedy_transformers(trainer: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    model, limit = trainer.model, trainer.args.max_completion_length
    model.eval()
    texts = []
    for start in range(0, len(prompts), EVAL_ROWS):
        batch = tokenizer(
            prompts[start : start + EVAL_ROWS], padding=True, padding_side="left", return_tensors="pt"
        )
        with torch.no_grad():
            ids = model.generate(**batch.to(model.device), do_sample=False, max_new_tokens=limit)
        texts += tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    model.train()
    return texts


def read_problems(file: str, tokenizer: Any, max_tokens: int) -> list[dict[str, str]]:
    """Prompts with the chat template, and what the reward looks at."""
    import pyarrow.parquet as pq

    problems = []
    for row in pq.read_table(file, columns=["prompt", "reward_model"]).to_pylist():
        text = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        if len(tokenizer(text)["input_ids"]) <= max_tokens:
            problems.append({"prompt": text, "ground_truth": str(row["reward_model"]["ground_truth"])})
    return problems


def reward(completions: list[str], ground_truth: list[str], **_: Any) -> list[float]:
    pairs = zip(completions, ground_truth, strict=True)
    return [
        compute_score(data_source="", solution_str=text, ground_truth=truth, extra_info={})
        for text, truth in pairs
    ]


if __name__ == "__main__":
    main()
