"""`python -m grpo_jax.audit` on real runs: interrupted ones too, and such that somebody has changed."""

import json
import shutil

import integration_helpers as helpers
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grpo_jax import audit
from grpo_jax.run.ledger import to_line

DYNAMIC = {
    "algorithm.dynamic_sampling_rounds": 4,
    "algorithm.old_logprobs": "sampler",
    "data.train_batch_size": 3,
    "algorithm.mask_truncated": True,
    "actor.num_minibatches": 2,
    "logging.save_rollouts": True,
    "checkpoint.every_steps": 1,
    "trainer.total_epochs": 2,
}


def run_audit(workdir):
    return helpers.call(audit.main, [workdir])


@pytest.fixture(scope="module")
def dynamic_run(tmp_path_factory):
    """A run with groups left out and left over, interrupted once, and what was printed."""
    folder = tmp_path_factory.mktemp("audit")
    reward = folder / "coarse.py"
    reward.write_text("def score(*, solution_str, **kwargs):\n    return float(len(solution_str) % 4 == 0)\n")
    overrides = DYNAMIC | {"reward.function": f"{reward}:score"}
    helpers.train_ok(folder / "run", overrides | {"trainer.num_steps": 3})
    helpers.train_ok(folder / "run", overrides | {"trainer.num_steps": 6})
    return folder / "run"


def test_a_run_is_accounted_for(dynamic_run):
    result = run_audit(dynamic_run)
    assert result.code == 0 and result.out.endswith("Every completion is accounted for, each once.\n")
    records = [
        record
        for step in range(1, 7)
        for record in helpers.read_jsonl(dynamic_run / "rollouts" / f"step-{step:06d}.jsonl")
    ]
    trained = [r for r in records if not r.get("is_dropped")]
    cut = [r for r in trained if r["finish_reason"] == "length"]
    assert len(trained) == 6 * 3 * 4 and 0 < len(cut) < len(trained) < len(records)
    tokens = sum(r["num_tokens"] for r in trained) - sum(r["num_tokens"] for r in cut)
    assert f"{len(trained) - len(cut)} completions trained: {tokens} tokens in the policy loss" in result.out
    assert f"{len(cut)} completions: truncated\n" in result.out
    assert f"{len(records) - len(trained)} completions: no spread\n" in result.out
    assert (
        "compared with 6 lines of metrics.jsonl, 2 checkpoints, 6 files of rollouts, 6 files of tokens\n"
        in result.out
    )


def edit_ledger(workdir, change):
    """Changes entries and writes them with checksums that fit: only the other checks can find it."""
    file, chain = workdir / "ledger" / "steps.jsonl", ""
    entries = [json.loads(line.partition("\t")[0]) for line in file.read_text().splitlines()]
    change(entries)
    with file.open("w") as out:
        for entry in entries:
            line, chain = to_line(entry, chain)
            out.write(line)


def swap_reward(entries):
    rewards = entries[1]["trained"]["reward"]
    rewards[rewards.index(0.0)] = 1.0


def train_twice(entries):
    entries[2]["trained"] = entries[1]["trained"]


def edit_metrics(workdir):
    lines = helpers.read_lines(workdir)
    lines[3]["response_length/max"] += 1
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def edit_rollouts(workdir):
    file = workdir / "rollouts" / "step-000002.jsonl"
    file.write_text(file.read_text().replace('"num_tokens": ', '"num_tokens": 1', 1))


def cut_tokens(workdir):
    file = workdir / "rollouts" / "step-000002.parquet"
    file.write_bytes(file.read_bytes()[:100])


def edit_tokens(workdir, change):
    file = workdir / "rollouts" / "step-000003.parquet"
    table = pq.read_table(file)
    ids = table["token_ids"].to_pylist()
    change(ids)
    place = table.column_names.index("token_ids")
    pq.write_table(table.set_column(place, "token_ids", pa.array(ids, pa.list_(pa.int32()))), file)


def drop_token(workdir):
    edit_tokens(workdir, lambda ids: ids[1].pop())


def change_token(workdir):
    edit_tokens(workdir, lambda ids: ids[0].__setitem__(0, ids[0][0] + 1))


def edit_progress(workdir):
    file = workdir / "checkpoints" / "6" / "progress" / "metadata"
    held = json.loads(file.read_text())
    file.write_text(json.dumps(held | {"num_rollout_batches": held["num_rollout_batches"] + 1}))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda w: edit_ledger(w, swap_reward), "step 2: metrics.jsonl has reward/mean "),
        (lambda w: edit_ledger(w, lambda e: e.pop()), "step 6 is in metrics.jsonl, and not in the ledger"),
        (lambda w: edit_ledger(w, train_twice), "was trained or left out 2 times"),
        (edit_metrics, "step 4: metrics.jsonl has response_length/max "),
        (edit_rollouts, "step 2: completion 0 of step-000002.jsonl is "),
        (cut_tokens, "step 2: step-000002.parquet cannot be read (ArrowInvalid)"),
        (drop_token, "step 3: completion 1 of step-000003.parquet has "),
        (change_token, "step 3: completion 0 of step-000003.parquet has other tokens than the ledger's"),
        (edit_progress, "the checkpoint of step 6 is damaged (progress/metadata "),
        (lambda w: (w / "metrics.jsonl").unlink(), "step 5 is in the ledger, and not in metrics.jsonl"),
    ],
)  # fmt: skip
def test_what_disagrees_is_named(dynamic_run, tmp_path, damage, said):
    shutil.copytree(dynamic_run, tmp_path / "run")
    damage(tmp_path / "run")
    result = run_audit(tmp_path / "run")
    assert result.code == 1 and "PROBLEM: " in result.out and said in result.out
    assert "accounted for" not in result.out


def test_line_ends_within_completions_are_no_damage(dynamic_run, tmp_path):
    """Older versions wrote Unicode's line ends as they are."""
    workdir = tmp_path / "run"
    shutil.copytree(dynamic_run, workdir)
    file = workdir / "rollouts" / "step-000002.jsonl"
    file.write_text(file.read_text().replace('"completion": "', '"completion": "\u2028\x85', 1))
    assert run_audit(workdir).code == 0


def test_masked_tokens_are_counted_one_by_one(tmp_path, reward_file):
    """Of tokens that sampler and trainer find equally likely but for the last bits, about half is masked."""
    overrides = {
        "reward.function": f"{reward_file}:score", "algorithm.rollout_is": "token_mask",
        "algorithm.rollout_is_low": 1.0, "algorithm.rollout_is_threshold": 1.1,
        "actor.micro_batch_size_per_device": 5, "trainer.num_steps": 1,
    }  # fmt: skip
    helpers.train_ok(tmp_path / "run", overrides)
    (line,) = helpers.read_lines(tmp_path / "run")
    (text,) = (tmp_path / "run" / "ledger" / "steps.jsonl").read_text().splitlines()
    entry = json.loads(text.partition("\t")[0])
    total, masked = sum(entry["trained"]["tokens"]), sum(entry["masked_tokens"].values())
    assert 0 < masked < total
    assert masked == pytest.approx(line["rollout_corr/is_masked_frac"] * total, abs=0.01)
    all_masked = [
        int(r) for r, n in entry["masked_tokens"].items() if n == entry["trained"]["tokens"][int(r)]
    ]
    assert entry["left_out"].get("rejected", []) == all_masked
    assert run_audit(tmp_path / "run").code == 0


def test_a_folder_without_a_run(tmp_path):
    result = run_audit(tmp_path)
    assert result.code == 2 and result.err.count("\n") == 1
    assert "no run has trained there" in result.err and str(tmp_path) in result.err
