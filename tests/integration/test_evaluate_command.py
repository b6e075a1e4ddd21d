"""Accuracy and pass@k: against enumeration, and as the command writes them."""

import itertools
import json
import shlex
import shutil

import integration_helpers as helpers
import numpy as np
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from grpo_jax import evaluate, export
from grpo_jax.data import arithmetic
from grpo_jax.rollout.evaluation import pass_at_k
from grpo_jax.run.evaluation_command import FLAGS


@pytest.mark.parametrize("n", range(1, 7))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_one(n):
    for c in range(n + 1):
        correct = [1] * c + [0] * (n - c)
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(correct, k))
            expected = sum(any(subset) for subset in subsets) / len(subsets)
            assert pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    splits = arithmetic.generate_splits(
        num_train=6, num_val=0, num_sft=0, difficulty=1, direct_share=0.0, seed=3
    )
    return arithmetic.write_splits(tmp_path_factory.mktemp("data"), splits)["train"]


def run(model_folder, data, tmp_path, *argv):
    files = [f"--json={tmp_path / 'out.json'}", f"--generations={tmp_path / 'out.jsonl'}"]
    common = [f"--model={model_folder}", f"--data={data}", "--max_response_length=8"]
    result = helpers.call(evaluate.main, [*common, *files, *argv])
    assert result.code == 0, result.err
    return result, json.loads((tmp_path / "out.json").read_text()), helpers.read_jsonl(tmp_path / "out.jsonl")


def test_greedy(model_folder, data, reward_file, tmp_path):
    result, summary, records = run(model_folder, data, tmp_path, f"--reward={reward_file}:score")
    rows = pq.read_table(data).to_pylist()
    assert [r["prompt_id"] for r in records] == [f"train/{i}" for i in range(6)]
    for record, row in zip(records, rows, strict=True):
        assert row["prompt"][0]["content"] in record["prompt"]
        assert record["ground_truth"] == row["reward_model"]["ground_truth"]
        assert record["reward"] == helpers.score(record["completion"])
        assert record["num_tokens"] <= 8
    accuracy = sum(r["reward"] >= 1 for r in records) / 6
    assert summary == {"accuracy": pytest.approx(accuracy), "num": 6}
    assert f"accuracy={accuracy:.4f}" in result.out
    # Greedy means greedy: the seed does not matter.
    assert run(model_folder, data, tmp_path, f"--reward={reward_file}:score", "--seed=1")[2] == records


def test_pass_at_k_of_samples(model_folder, data, reward_file, tmp_path):
    argv = [f"--reward={reward_file}:score", "--num=5", "--num_samples=4", "--temperature=1"]
    _, summary, records = run(model_folder, data, tmp_path, *argv)
    assert len(records) == 20
    rewards = np.array([helpers.score(r["completion"]) for r in records]).reshape(5, 4)
    assert [r["reward"] for r in records] == rewards.ravel().tolist()
    is_correct = rewards >= 1
    assert 0 < is_correct.sum() < 20  # or the test would show little
    assert set(summary) == {"accuracy", "num", "pass@1", "pass@2", "pass@4"} and summary["num"] == 5
    assert summary["accuracy"] == pytest.approx(is_correct.mean())
    for k in (1, 2, 4):
        by_prompt = [np.mean([any(s) for s in itertools.combinations(row, k)]) for row in is_correct]
        assert summary[f"pass@{k}"] == pytest.approx(np.mean(by_prompt))
    again = run(model_folder, data, tmp_path, *argv)[2]
    assert again == records
    assert run(model_folder, data, tmp_path, *argv, "--seed=1")[2] != records


def test_prompts_that_are_too_long_are_left_out_and_counted(model_folder, data, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    rows = pq.read_table(data).to_pylist()
    lengths = [
        len(
            tokenizer.apply_chat_template(r["prompt"], add_generation_prompt=True, return_dict=True)[
                "input_ids"
            ]
        )
        for r in rows
    ]
    limit = sorted(lengths)[3] - 1
    result, summary, _ = run(model_folder, data, tmp_path, f"--max_prompt_length={limit}")
    kept = sum(n <= limit for n in lengths)
    assert summary["num"] == kept < 6
    assert f"{6 - kept} prompts longer than {limit} tokens are left out" in result.out


def test_a_reward_that_fails_is_counted_as_0(model_folder, data, tmp_path):
    file = tmp_path / "failing.py"
    file.write_text("def score(**kwargs):\n    raise KeyError('no such answer')\n")
    result, summary, _ = run(model_folder, data, tmp_path, f"--reward={file}:score", "--num=2")
    assert summary == {"accuracy": 0.0, "num": 2}
    assert result.out.count("reward error, counted as 0: prompt train/") == 2


def printed_command(out):
    """The flags of the command that a run prints at its end."""
    (line,) = [line for line in out.splitlines() if line.startswith("Evaluate it:")]
    words = shlex.split(line.removeprefix("Evaluate it:"))
    assert words[:3] == ["python", "-m", "grpo_jax.evaluate"]
    return words[3:]


def test_the_printed_command_gives_what_training_reported(whole_run, tmp_path):
    workdir, out = whole_run
    files = [f"--json={tmp_path / 'out.json'}", f"--generations={tmp_path / 'out.jsonl'}"]
    result = helpers.call(evaluate.main, [*printed_command(out), *files])
    assert result.code == 0, result.err
    accuracy = helpers.read_lines(workdir)[-1]["val/accuracy"]
    assert json.loads((tmp_path / "out.json").read_text())["accuracy"] == pytest.approx(accuracy)
    expected = helpers.read_jsonl(workdir / "validation" / "step-000006.jsonl")
    records = helpers.read_jsonl(tmp_path / "out.jsonl")
    assert [r["completion"] for r in records] == [r["completion"] for r in expected]
    assert [r["reward"] for r in records] == [r["reward"] for r in expected]


def test_the_printed_command_omits_what_is_a_default():
    args = evaluate.command_parser().parse_args(["--model=m", "--data", "a", "b"])
    assert args.data == ["a", "b"]
    assert {name: getattr(args, name) for name in FLAGS} == {name: of for name, (_, of) in FLAGS.items()}


@pytest.mark.slow
def test_it_stops_where_training_stopped(model_folder, data, reward_file, tmp_path):
    """The folders name the run's stop ids; and a model may be used beyond the positions that it was made for."""
    short = tmp_path / "short"
    shutil.copytree(model_folder, short)
    content = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(content | {"max_position_embeddings": 16}))
    _, _, free = run(model_folder, data, tmp_path)
    words = AutoTokenizer.from_pretrained(model_folder)([record["completion"] for record in free])[
        "input_ids"
    ]
    stops = tuple(sorted({token for completion in words for token in completion}))
    overrides = {
        "model.path": short,
        "model.allow_beyond_max_position": True,
        "rollout.stop_token_ids": stops,
        "optim.learning_rate": 1e-9,  # the trained model would say the same without them
        "reward.function": f"{reward_file}:score",
        "eval.every_steps": 1,
        "trainer.num_steps": 1,
    }
    workdir = tmp_path / "run"
    helpers.train_ok(workdir, overrides)
    trained, exported = workdir / "checkpoint-final", tmp_path / "exported"
    assert helpers.call(export.main, [f"--checkpoint={workdir}", f"--output={exported}"]).code == 0
    assert helpers.tree_digest(exported) == helpers.tree_digest(trained)
    eos = json.loads((model_folder / "generation_config.json").read_text())["eos_token_id"]
    assert json.loads((trained / "generation_config.json").read_text())["eos_token_id"] == [eos, *stops]
    argv = [f"--reward={reward_file}:score", "--allow_beyond_max_position"]
    _, _, records = run(trained, workdir / "data" / "val.parquet", tmp_path, *argv)
    expected = helpers.read_jsonl(workdir / "validation" / "step-000001.jsonl")
    shown = ("completion", "num_tokens", "finish_reason", "reward")
    assert [[r[name] for name in shown] for r in records] == [[r[name] for name in shown] for r in expected]
    assert any(r["num_tokens"] < 8 for r in expected)


def refusal(*argv):
    result = helpers.call(evaluate.main, argv)
    assert result.code == 2 and result.err.count("\n") == 1
    return result.err


def test_folders_of_a_run_that_are_no_models(whole_run, data, tmp_path):
    workdir = whole_run[0]
    models = [f"{workdir}/checkpoint-epoch-1", f"{workdir}/checkpoint-epoch-2"]
    assert refusal(f"--model={workdir}", f"--data={data}") == (
        f"error: --model='{workdir}': is the workdir of a run; the models in it: {', '.join(models)}\n"
    )
    (tmp_path / "checkpoints").mkdir()
    said = refusal(f"--model={tmp_path}", f"--data={data}")
    assert f"the models in it: none yet; `python -m grpo_jax.export --checkpoint={tmp_path} --output" in said
    assert refusal(f"--model={workdir}/checkpoint-epoch-9", f"--data={data}") == (
        f"error: --model='{workdir}/checkpoint-epoch-9': there is no such folder; {workdir} has "
        "checkpoint-epoch-1, checkpoint-epoch-2\n"
    )


@pytest.mark.parametrize("size", [4, -4, None])
def test_a_damaged_model_of_a_run_is_not_to_be_downloaded(whole_run, data, tmp_path, size):
    folder = shutil.copytree(whole_run[0] / "checkpoint-epoch-2", tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size]) if size else file.unlink()
    said = refusal(f"--model={folder}", f"--data={data}")
    assert f"--model='{file}'" in said and "download" not in said
    assert "a run wrote it: `python -m grpo_jax.export --checkpoint=WORKDIR --output=NEW` makes it" in said
