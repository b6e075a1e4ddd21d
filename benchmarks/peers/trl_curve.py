"""TRL's side of benchmarks/learning_curve.py: one run; prints one line "STEP {...}" a step and saves the model.

    python benchmarks/peers/trl_curve.py --model=DIR --data=FILE.parquet --output=DIR --settings='{...}'

The settings are those of our configuration, by TRL's names for the same thing. What stands here in words is where
the two would differ otherwise.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from transformers import AutoTokenizer
from trl_run import Report

sys.path.append(str(Path(__file__).resolve().parents[2]))
from grpo_jax.rewards.gsm8k import compute_score  # standard library only


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for flag in ("--model", "--data", "--output", "--settings"):
        parser.add_argument(flag, required=True)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    config = trl.GRPOConfig(
        output_dir=args.output,
        loss_type="dapo",  # every token of the batch weighs the same: our token-mean
        scale_rewards="group",  # divided by the group's spread + 1e-4; ours + 1e-6
        num_iterations=1,
        lr_scheduler_type="constant",
        shuffle_dataset=False,  # both take the problems in the order of the file
        model_init_kwargs={"dtype": "float32"},
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        **json.loads(args.settings),
    )
    trainer = trl.GRPOTrainer(
        model=args.model,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_list(read_problems(args.data, tokenizer)),
        processing_class=tokenizer,
    )
    trainer.add_callback(Report(trainer))
    trainer.train()
    trainer.save_model(args.output)


def read_problems(file: str, tokenizer: Any) -> list[dict[str, str]]:
    """Prompts with the chat template, and what the reward looks at."""
    import pyarrow.parquet as pq

    problems = []
    for row in pq.read_table(file, columns=["prompt", "reward_model"]).to_pylist():
        text = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
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
