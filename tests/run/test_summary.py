"""What a person reads at the start and at the end of a run."""

import logging
import shlex

import ml_dtypes
import numpy as np
import pytest
from config_helpers import gsm8k
from matplotlib import pyplot
from test_budget import QWEN_1_5B

from grpo_jax.learner.memory import abstract_mesh
from grpo_jax.model.config import parse_hf_config
from grpo_jax.rollout.base import derive_seed
from grpo_jax.rollout.evaluation import write_jsonl
from grpo_jax.run.evaluation_command import evaluation_command
from grpo_jax.run.speed import Speed
from grpo_jax.run.summary import LOST_BELOW, _question, batch_table, doubts, draw_learning_curve, print_report
from grpo_jax.run.workdir import Workdir


def test_table_of_the_shipped_run():
    table = dict(batch_table(gsm8k(), num_data_shards=8, steps_per_epoch=29))
    assert table == {
        "prompts per step": "256",
        "completions per step": "1,024 (4 a prompt)",
        "updates per step": "1 (mini-batches: 1, passes: 1)",
        "completions per update": "1,024",
        "micro-batches per update": "at most 32, of 4 packed rows of 1,024 tokens on each of 8 data shards",
        "tokens per step, at most": "1,048,576",  # 1,024 x (512 + 512)
        "steps per epoch": "29",
        "steps in all": "87",
    }


def test_table_of_an_uneven_run():
    changes = {
        "data.train_batch_size": 5,
        "algorithm.group_size": 6,
        "actor.num_minibatches": 2,
        "actor.num_epochs": 3,
        "actor.micro_batch_tokens_per_device": 2048,
        "trainer.num_steps": 10,
    }
    table = dict(batch_table(gsm8k(**changes), num_data_shards=4, steps_per_epoch=1494))
    assert table["updates per step"] == "6 (mini-batches: 2, passes: 3)"
    assert table["completions per update"] == "15"
    # 2,048 tokens hold 2 rows of 1,024; 4 shards hold 8 rows, so 2 micro-batches of 8 for 15.
    assert table["micro-batches per update"] == (
        "at most 2, of 2 packed rows of 1,024 tokens on each of 4 data shards"
    )
    assert table["steps in all"] == "10"


def test_the_command_that_repeats_a_validation(tmp_path):
    changes = {
        "data.val_files": ("a.parquet", "b c.parquet"),
        "data.chat_template_args": ("enable_thinking=False", "x=1"),
        "data.max_prompt_length": 2048,
        "data.max_response_length": 512,
        "data.overlong_prompts": "truncate",
        "reward.function": "my reward.py:score",
        "model.allow_beyond_max_position": True,
        "model.dtype": "bfloat16",
        "eval.temperature": 0.5,
        "eval.num_samples": 4,
        "rollout.engine": "vllm",
        "rollout.gpu_memory_utilization": 0.5,
        "rollout.tensor_parallel_size": 2,
        "rollout.python": "",
    }
    command = evaluation_command(gsm8k(**changes), Workdir(tmp_path), "model", step=6)
    assert shlex.split(command) == [
        *("python", "-m", "grpo_jax.evaluate", "--model=model", "--data", "a.parquet", "b c.parquet"),
        *("--reward=my reward.py:score", "--chat_template_args", "enable_thinking=False", "x=1"),
        *("--overlong_prompts=truncate", "--allow_beyond_max_position", "--temperature=0.5"),
        *("--num_samples=4", "--dtype=bfloat16", "--engine=vllm", "--tensor_parallel_size=2"),
        f"--seed={derive_seed(gsm8k().trainer.seed, 6, 'validation')}",
    ]


@pytest.mark.parametrize(
    "prompt",
    [
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nTwo\nand two?<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n1<|im_end|>\n"
        "<|im_start|>user\nTwo\nand two?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nTwo and two?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<bos><start_of_turn>user\nTwo and two?<end_of_turn>\n<start_of_turn>model\n",
        "<|system|>\nBe brief.<|end|>\n<|user|>\nTwo and two?<|end|>\n<|assistant|>\n",
        "<s>[INST] Two and two?[/INST]",
        "Two and two?",
    ],
)
def test_a_question_is_shown_without_its_template(prompt):
    assert _question(prompt) == "Two and two?"


def report(tmp_path, caplog, monkeypatch, steps, **changes):
    """What is printed at the end of a run of 6 steps with validations after `steps`."""
    workdir = Workdir(tmp_path)
    lines = [{"step": step, "epoch": 1} for step in range(7)]
    for step in steps:
        lines[step]["val/accuracy"] = step / 8
        record = {"prompt": "Q", "ground_truth": "5", "completion": f"text {step}", "reward": 0.0}
        write_jsonl(workdir.validation / f"step-{step:06d}.jsonl", [record])
    write_jsonl(workdir.metrics, lines)
    log = logging.getLogger("grpo_jax")
    monkeypatch.setattr(log, "propagate", False)
    log.addHandler(caplog.handler)
    log.setLevel(logging.INFO)
    try:
        config = gsm8k(**changes)
        speed = Speed(config, parse_hf_config(QWEN_1_5B), abstract_mesh(1, 1, 1), card="")
        print_report(config, workdir, tmp_path / "model", speed, first_step=0)
    finally:
        log.removeHandler(caplog.handler)
    return [record.getMessage() for record in caplog.records]


def test_a_validation_before_training_is_called_so(tmp_path, caplog, monkeypatch):
    said = report(tmp_path, caplog, monkeypatch, (0, 3, 6))
    assert "Accuracy on held-out problems (greedy): 0.0 % before, 75.0 % after." in said
    assert said.index("    before: text 0") + 1 == said.index("    after:  text 6")


def test_a_later_one_is_called_by_its_step(tmp_path, caplog, monkeypatch):
    said = report(tmp_path, caplog, monkeypatch, (2, 4))
    assert "Accuracy on held-out problems (greedy): 25.0 % after step 2, 50.0 % after step 4." in said
    assert said.index("    after step 2: text 2") + 1 == said.index("    after step 4: text 4")
    assert not any("before" in line for line in said)


@pytest.mark.parametrize(("rewards", "bottom"), [((-3.0, -1.0), -3.0), ((0.25, 0.5), 0.0)])
def test_the_learning_curve_shows_every_reward(tmp_path, monkeypatch, rewards, bottom):
    limits = []
    close = pyplot.close
    monkeypatch.setattr(
        pyplot, "close", lambda figure: (limits.append(figure.axes[0].get_ylim()), close(figure))
    )
    lines = [{"step": step, "reward/mean": reward} for step, reward in enumerate(rewards)]
    draw_learning_curve(lines, tmp_path / "curve.png")
    ((low, high),) = limits
    assert low <= bottom and high >= max(rewards)
    assert low == 0.0 or bottom < 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, []),
        ({"optim.warmup_steps": 12}, []),  # the last of 3 steps with 4 updates has the peak
        (
            {"optim.warmup_steps": 16},
            ["optim.warmup_steps=16", "12 updates", "ends at 75% of optim.learning_rate=1e-06"],
        ),
        ({"model.param_dtype": "bfloat16", "optim.learning_rate": 7.9e-5}, []),
        (
            {"model.param_dtype": "bfloat16", "optim.learning_rate": 7.8e-5},
            ["optim.learning_rate=7.8e-05", "below 7.8e-05", "model.param_dtype=bfloat16"],
        ),
    ],
)
def test_what_is_hardly_meant_is_said_in_a_line(changes, said):
    lines = doubts(gsm8k(**{"actor.num_minibatches": 2, "actor.num_epochs": 2} | changes), num_steps=3)
    assert len(lines) == bool(said)
    for line in lines:
        assert line.startswith("WARNING: ") and all(part in line for part in said)


def test_from_which_learning_rate_on_bfloat16_takes_up_an_update():
    """The bound is that of the weights which are coarsest for their size, just above a power of two."""
    coarsest = np.float32(
        2**-6
    )  # 0.0156; of 0.02, which has the same neighbours' distance, it takes the same
    kept = lambda change: np.float32((coarsest + np.float32(change)).astype(ml_dtypes.bfloat16)) != coarsest
    assert not kept(0.99 * coarsest * 2**-8) and kept(1.01 * coarsest * 2**-8)
    assert pytest.approx(2**-8 * 0.02) == LOST_BELOW
    # And so all that Adam gives to a matrix of such weights stays, or next to nothing does.
    weights = np.random.default_rng(0).normal(0, 0.02, 10_000).astype(ml_dtypes.bfloat16)
    share = lambda rate: np.mean(
        (weights.astype(np.float32) + np.float32(rate)).astype(weights.dtype) != weights
    )
    assert share(1e-6) < 0.02 and share(LOST_BELOW) > 0.8
