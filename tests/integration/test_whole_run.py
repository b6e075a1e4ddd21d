"""A whole tiny run: every file is there, and every number in them is what it says it is."""

import json
import re

import integration_helpers as helpers
import numpy as np
import pytest

from grpo_jax.config.text import printable

G, P = 4, 4
STEPS = 6
ALWAYS = [
    "reward/mean", "reward/std", "reward/max", "reward/min", "accuracy", "kl/mean", "actor/loss",
    "actor/grad_norm", "actor/lr", "actor/entropy", "actor/pg_clipfrac", "actor/ppo_kl",
    "response_length/mean", "response_length/max", "response_length/min", "response_length/clip_ratio",
    "prompt_length/mean", "prompt_length/max", "prompt_length/min", "frac_reward_zero_std",
    "training/global_step", "training/epoch", "training/policy_version",
    "training/rollout_probs_diff_mean", "training/rollout_probs_diff_max",
    "training/token_mult_prob_error", "timing_s/gen", "timing_s/reward", "timing_s/old_log_prob",
    "timing_s/ref", "timing_s/update_actor", "timing_s/update_weights", "timing_s/save_checkpoint",
    "timing_s/step", "perf/throughput", "perf/max_memory_allocated_gb", "perf/memory_planned_gb",
]  # fmt: skip


@pytest.fixture(scope="module")
def workdir(whole_run):
    return whole_run[0]


@pytest.fixture(scope="module")
def out(whole_run):
    return whole_run[1]


@pytest.fixture(scope="module")
def lines(workdir):
    """The lines of metrics.jsonl by step; 0 is the validation before training."""
    lines = helpers.read_lines(workdir)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5, 6]
    return lines


@pytest.fixture(scope="module")
def rollouts(workdir):
    """The completions of every step, in groups: {step: [[record, ...], ...]}."""
    steps = {}
    for step in range(1, STEPS + 1):
        records = helpers.read_jsonl(workdir / "rollouts" / f"step-{step:06d}.jsonl")
        steps[step] = [records[i : i + G] for i in range(0, len(records), G)]
    return steps


def test_every_file_is_there(workdir):
    present = {path.name for path in workdir.iterdir()}
    assert present >= {
        "config.json", "train.log", "metrics.jsonl", "tensorboard", "checkpoints",
        "checkpoint-epoch-1", "checkpoint-epoch-2", "rollouts", "learning_curve.png",
    }  # fmt: skip
    for epoch in (1, 2):
        files = {path.name for path in (workdir / f"checkpoint-epoch-{epoch}").iterdir()}
        assert files >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
                         "generation_config.json"}  # fmt: skip
    # Steps 4 (every_steps) and 6 (the last).
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()) == ["4", "6"]
    assert sorted(p.name for p in (workdir / "rollouts").iterdir()) == [
        f"step-{step:06d}.{end}" for step in range(1, 7) for end in ("jsonl", "parquet")
    ]
    assert (workdir / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert not list(workdir.rglob("*.tmp"))


def test_config_json_is_the_resolved_config(workdir, whole_run_overrides):
    from grpo_jax.config import parse_config

    held = json.loads((workdir / "config.json").read_text())
    assert parse_config(held).to_dict() == held
    import tiny_config

    for key, value in (tiny_config.TINY | whole_run_overrides).items():
        section, name = key.split(".")
        assert held[section][name] == value, key


def test_one_line_a_step(lines):
    assert [line["epoch"] for line in lines] == [0, 1, 1, 1, 2, 2, 2]
    times = [line["time"] for line in lines]
    assert times == sorted(times)
    for line in lines[1:]:
        assert set(ALWAYS) <= set(line)
        assert all(isinstance(line[name], int | float) for name in ALWAYS)
        assert (line["training/global_step"], line["training/epoch"]) == (line["step"], line["epoch"])
        assert line["training/policy_version"] == line["step"] - 1
    # eval.before_training, and every second step.
    assert [line["step"] for line in lines if "val/accuracy" in line] == [0, 2, 4, 6]
    assert all(("timing_s/testing" in line) == ("val/accuracy" in line) for line in lines)


def test_rollouts_are_groups_of_fresh_prompts(rollouts):
    seen = {1: [], 2: []}
    for step, groups in rollouts.items():
        assert [len(group) for group in groups] == [G] * P
        for group in groups:
            assert len({(r["prompt_id"], r["prompt"], r["ground_truth"]) for r in group}) == 1
            assert {r["policy_version"] for r in group} == {step - 1}
            seen[1 if step <= 3 else 2].append(group[0]["prompt_id"])
    for ids in seen.values():
        assert len(set(ids)) == 12 and set(ids) <= {f"train/{i}" for i in range(13)}
    assert seen[1] != seen[2]  # shuffled anew


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_the_tokens_say_what_the_metrics_say(step, lines, rollouts, workdir):
    """With two mini-batches a step: metrics are means over the updates, of the tokens of each."""
    import pyarrow.parquet as pq

    rows = pq.read_table(workdir / "rollouts" / f"step-{step:06d}.parquet").to_pylist()
    for row, record in zip(rows, [r for group in rollouts[step] for r in group], strict=True):
        assert {name: row[name] for name in record if name != "num_tokens"} == {
            name: record[name] for name in record if name != "num_tokens"
        }
        assert len(row["token_ids"]) == len(row["logprobs"]) == record["num_tokens"]
        assert np.allclose(row["trainer_logprobs"], row["sampler_logprobs"], atol=1e-4)
    entry = json.loads((workdir / "ledger" / "steps.jsonl").read_text().splitlines()[step - 1].split("\t")[0])
    of = lambda number: [row for row, at in zip(rows, entry["minibatch"], strict=True) if at == number]
    flat = lambda number, name: np.concatenate([row[name] for row in of(number)])
    mean = lambda value: np.mean([np.mean(value(number)) for number in (0, 1)])
    names = {
        "actor/ppo_kl": lambda n: flat(n, "old_logprobs") - flat(n, "logprobs"),
        "actor/pg_clipfrac": lambda n: flat(n, "is_clipped"),
        "training/rollout_probs_diff_mean": lambda n: abs(
            np.exp(flat(n, "trainer_logprobs")) - np.exp(flat(n, "sampler_logprobs"))
        ),
    }
    for name, value in names.items():
        assert mean(value) == pytest.approx(lines[step][name], abs=1e-6), name
    assert (flat(0, "logprobs") == flat(0, "old_logprobs")).all()  # before anything was updated
    assert (flat(1, "logprobs") != flat(1, "old_logprobs")).any()
    assert all(row["weighs"] == [True] * len(row["token_ids"]) for row in rows)


@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_metrics_are_those_of_the_rollouts(step, lines, rollouts, workdir):
    from transformers import AutoTokenizer

    line, groups = lines[step], rollouts[step]
    records = [r for group in groups for r in group]
    rewards = [helpers.score(r["completion"]) for r in records]
    assert [r["reward"] for r in records] == rewards
    lengths = [r["num_tokens"] for r in records]
    tokenizer = AutoTokenizer.from_pretrained(workdir / "checkpoint-epoch-2")
    prompts = [len(tokenizer(g[0]["prompt"], add_special_tokens=False)["input_ids"]) for g in groups]
    flat = [len({r["reward"] for r in group}) == 1 for group in groups]
    mean = sum(rewards) / 16
    expected = {
        "reward/mean": mean,
        "reward/std": (sum((r - mean) ** 2 for r in rewards) / 16) ** 0.5,
        "reward/max": max(rewards),
        "reward/min": min(rewards),
        "accuracy": sum(r >= 1 for r in rewards) / 16,
        "frac_reward_zero_std": sum(flat) / P,
        "response_length/mean": sum(lengths) / 16,
        "response_length/max": max(lengths),
        "response_length/min": min(lengths),
        "response_length/clip_ratio": sum(r["finish_reason"] == "length" for r in records) / 16,
        "prompt_length/mean": sum(prompts) / P,
        "prompt_length/max": max(prompts),
        "prompt_length/min": min(prompts),
        "actor/lr": 1e-2,
        "actor/skipped_updates": 0,
        "reward/num_errors": 0,
        # tokens of all sequences over seconds, on one device
        "perf/throughput": (sum(lengths) + G * sum(prompts)) / line["timing_s/step"],
    }
    for name, value in expected.items():
        assert line[name] == pytest.approx(value, rel=1e-6, abs=1e-7), name
    for r in records:  # 8 tokens are the limit, and only that ends a completion without EOS
        assert r["finish_reason"] in ("stop", "length") and r["num_tokens"] <= 8
        assert r["finish_reason"] == "stop" or r["num_tokens"] == 8


def test_metrics_of_the_update_are_sane(lines):
    for line in lines[1:]:
        assert 0 < line["actor/entropy"] <= np.log(300)  # the vocabulary
        assert 0 <= line["actor/pg_clipfrac"] <= 1
        assert line["kl/mean"] > 0  # the second update of a step finds the policy moved
        assert line["actor/grad_norm"] > 0
        # sampler and trainer are one model in float32
        assert line["training/rollout_probs_diff_max"] < 1e-4
        assert 1 <= line["training/token_mult_prob_error"] < 1 + 1e-4
        phases = ["gen", "reward", "old_log_prob", "ref", "update_actor", "update_weights"]
        parts = [line[f"timing_s/{phase}"] for phase in phases]
        assert min(parts) >= 0 and sum(parts) <= line["timing_s/step"]


def test_validation_accuracy_is_that_of_its_file(lines, workdir):
    for step in (0, 2, 4, 6):
        records = helpers.read_jsonl(workdir / "validation" / f"step-{step:06d}.jsonl")
        assert [r["prompt_id"] for r in records] == [f"val/{i}" for i in range(5)]
        correct = sum(helpers.score(r["completion"]) >= 1 for r in records)
        assert lines[step]["val/accuracy"] == pytest.approx(correct / 5)


def test_tensorboard_has_the_same_numbers(lines, workdir):
    scalars, _ = helpers.read_events(workdir)
    expected = {
        (name, line["step"]): np.float32(value)
        for line in lines
        for name, value in line.items()
        if name not in ("step", "epoch", "time") and value is not None
    }
    assert scalars == expected


def test_tensorboard_shows_text_samples(rollouts, workdir):
    _, texts = helpers.read_events(workdir)
    by_name = {}
    for (tag, step), text in texts.items():
        by_name.setdefault(tag.split("/text_summary")[0], {})[step] = text
    assert set(by_name) == {"rollouts", "val/completions"}
    assert set(by_name["rollouts"]) == {1, 2, 3, 4, 5, 6} and set(by_name["val/completions"]) == {0, 2, 4, 6}
    for step, text in by_name["rollouts"].items():
        samples = text.split("\n\n---\n\n")
        assert len(samples) == 2  # logging.num_text_samples
        for sample, record in zip(samples, rollouts[step][0][:2], strict=True):
            plain = "\n".join(line.removeprefix("    ") for line in sample.split("\n"))
            assert plain.startswith(printable(record["prompt"] + record["completion"]))
            assert f"reward {record['reward']:g}, ground truth {record['ground_truth']}" in plain


def test_console_lines_have_their_form(lines, out):
    expected = []
    for line in lines[1:]:
        step_of_epoch = (line["step"] - 1) % 3 + 1
        if step_of_epoch == 1:
            expected.append(f"Epoch {line['epoch']}/2:")
        values = {"reward_mean": "reward/mean", "kl_mean": "kl/mean", "actor_loss": "actor/loss"}
        if "val/accuracy" in line:
            values["val_accuracy"] = "val/accuracy"
        shown = ", ".join(f"{label}={line[name]:.4g}" for label, name in values.items())
        expected.append(f"  Step {step_of_epoch}/3: {shown} [{line['timing_s/step']:.1f}s]")
    printed = [text for text in out.splitlines() if re.match(r"Epoch \d|  Step \d", text)]
    assert printed == expected
    number = r"-?\d[\d.]*(e[+-]\d+)?"  # Step 1/29: reward_mean=0.15, kl_mean=0.05, actor_loss=2.31 [15.2s]
    form = rf"  Step 1/3: reward_mean={number}, kl_mean={number}, actor_loss={number} \[\d+\.\ds\]"
    assert re.fullmatch(form, printed[1])


def test_the_log_has_what_the_console_has(workdir, out):
    log = (workdir / "train.log").read_text()
    for text in out.splitlines()[out.splitlines().index("Epoch 1/2:") :]:
        assert text in log
    assert re.search(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ INFO   Step 1/3: ", log, re.M)


def test_the_table_of_batch_sizes(out):
    table = dict(re.findall(r"^  (\S.*?\S)  +(\S.*)$", out, re.M))
    assert table["prompts per step"] == "4"
    assert table["completions per step"].split()[0] == "16"  # 4 prompts x 4
    assert table["updates per step"].split()[0] == "2"
    assert table["completions per update"] == "8"  # 16 in 2 mini-batches
    assert table["micro-batches per update"].startswith("at most 1, of 8 packed rows of ")
    assert table["tokens per step, at most"] == "1,408"  # 16 x (80 + 8)
    assert table["steps per epoch"] == "3"  # 13 prompts, 4 a step
    assert table["steps in all"] == "6"


def test_the_report_says_what_changed_and_where_it_is(lines, workdir, out):
    before, after = lines[0]["val/accuracy"], lines[6]["val/accuracy"]
    assert f"(greedy): {100 * before:.1f} % before, {100 * after:.1f} % after" in out
    for path in ("learning_curve.png", "tensorboard", "checkpoint-epoch-2"):
        assert str(workdir / path) in out


def test_the_tokenizer_is_the_same_when_it_is_loaded(workdir):
    """`AutoTokenizer` knows qwen2's class and goes by that; a resumed run must see the tokens of the first."""
    from transformers import AutoTokenizer

    from grpo_jax.model.random_model import make_tokenizer

    rows = helpers.read_jsonl(workdir / "rollouts" / "step-000001.jsonl")
    made = make_tokenizer([row["prompt"] for row in rows], 300)
    made.save_pretrained(workdir.parent / "tokenizer")
    (workdir.parent / "tokenizer" / "config.json").write_text(
        (workdir / "model_files/config.json").read_text()
    )
    loaded = AutoTokenizer.from_pretrained(workdir.parent / "tokenizer")
    texts = [row["prompt"] for row in rows] + [
        "12 + 3=15.\n#### 15",
        "it's  a\ttab\n\n",
        "Cafe\u0301 2,5 \u20ac",
    ]
    assert loaded(texts)["input_ids"] == made(texts)["input_ids"]
    assert [made.decode(made(t)["input_ids"]) for t in texts[-3:-1]] == texts[-3:-1]
