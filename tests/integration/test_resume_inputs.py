"""Going on with another day, other data, another coefficient or group size: what stays, and what is refused.

The run of `begun` has taken one step: an adaptive coefficient in the reward, groups that dynamic sampling has left
over, and a chat template that prints the date.
"""

import datetime
import json
import shutil

import integration_helpers as helpers
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import transformers.utils.chat_template_utils as chat_templates
from transformers import AutoTokenizer

from grpo_jax.data import arithmetic

# Some spread for one prompt, none for the next: some rounds fill no batch, and the next one leaves groups over.
REWARD = """
def score(*, data_source, solution_str, ground_truth, extra_info):
    return 0.0 if int(ground_truth) % 2 else sum(solution_str.encode()) % 5 / 4
"""
DATED = (
    "{{ strftime_now('%d %b %Y') }}\n{% for m in messages %}{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)


class AnotherDay(datetime.datetime):
    """The clock of a machine in another century, as transformers and this package look at it."""

    @classmethod
    def now(cls, tz=None):
        return cls(2101, 2, 3, 4, 5, 6)


@pytest.fixture
def another_day(monkeypatch):
    monkeypatch.setattr(chat_templates, "datetime", AnotherDay)
    monkeypatch.setattr(datetime, "datetime", AnotherDay)


@pytest.fixture(scope="module")
def overrides(tmp_path_factory, model_folder):
    """Of a run that reads files. Nothing in it may be changed by a test but for the data, which each copies."""
    folder = tmp_path_factory.mktemp("inputs")
    shutil.copytree(model_folder, folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = DATED
    tokenizer.save_pretrained(folder / "model")
    (folder / "reward.py").write_text(REWARD)
    splits = arithmetic.generate_splits(
        num_train=13, num_val=5, num_sft=0, difficulty=1, direct_share=0.0, seed=3
    )
    files = arithmetic.write_splits(folder / "data", splits)
    return {
        "model.path": folder / "model",
        "arithmetic.num_train": 0,
        "data.train_files": (str(files["train"]),),
        "data.val_files": (str(files["val"]),),
        "data.max_prompt_length": 120,
        "reward.function": f"{folder / 'reward.py'}:score",
        "algorithm.dynamic_sampling_rounds": 5,
        "algorithm.old_logprobs": "sampler",
        "algorithm.kl_in": "reward",
        "algorithm.kl_coef": 0.5,
        "algorithm.kl_target": 10.0,
        "algorithm.kl_horizon": 100.0,
        "optim.warmup_steps": 100,
        "logging.save_rollouts": True,
        "trainer.num_steps": 1,
    }


@pytest.fixture(scope="module")
def begun(tmp_path_factory, overrides):
    """A workdir after one step, which tests copy."""
    workdir = tmp_path_factory.mktemp("begun") / "run"
    out = helpers.train_ok(workdir, overrides)
    assert "WARNING: optim.warmup_steps=100 is beyond the 1 updates of this run" in out
    return workdir


def progress(workdir, step):
    return json.loads((workdir / "checkpoints" / str(step) / "progress" / "metadata").read_text())


def copy_of(begun, tmp_path):
    shutil.copytree(begun, tmp_path / "run")
    return tmp_path / "run"


def other_truths(overrides, folder):
    """The overrides with as many problems, of which the last has another answer."""
    table = pq.read_table(overrides["data.train_files"][0]).to_pylist()
    table[-1]["reward_model"]["ground_truth"] = "-1"
    pq.write_table(pa.Table.from_pylist(table), folder / "edited.parquet")
    return folder / "edited.parquet"


def test_a_run_goes_on_with_the_day_on_which_it_began(begun, overrides, tmp_path, another_day):
    day = datetime.datetime.fromisoformat(json.loads((begun / "beginning.json").read_text())["date"])
    workdir, kept = copy_of(begun, tmp_path), progress(begun, 1)["surplus"]
    assert kept and day.year < 2101
    out = helpers.train_ok(workdir, overrides | {"trainer.num_steps": 2})
    assert "Going on after step 1 of 2." in out and "left over" not in out
    lines = helpers.read_lines(workdir)
    assert lines[-1]["dynamic/num_carried"] == len(kept)
    for step in (1, 2):
        records = helpers.read_jsonl(workdir / "rollouts" / f"step-{step:06d}.jsonl")
        assert all(record["prompt"].startswith(f"{day:%d %b %Y}\n") for record in records)
    # An adaptive coefficient goes on from where it was.
    assert lines[-1]["kl/coef"] == progress(begun, 1)["kl_coef"] != 0.5
    assert (workdir / "beginning.json").read_bytes() == (begun / "beginning.json").read_bytes()


def test_a_new_run_begins_on_its_own_day(overrides, tmp_path, another_day):
    workdir = tmp_path / "run"
    helpers.train_ok(workdir, overrides)
    record = helpers.read_jsonl(workdir / "rollouts" / "step-000001.jsonl")[0]
    assert record["prompt"].startswith("03 Feb 2101\n")
    assert json.loads((workdir / "beginning.json").read_text())["date"] == "2101-02-03T04:05:06"


@pytest.mark.slow
def test_edited_data_are_refused_and_can_be_insisted_on(begun, overrides, tmp_path):
    workdir = copy_of(begun, tmp_path)
    held = json.loads((workdir / "config.json").read_text())
    edited = other_truths(overrides, tmp_path)
    # The file under the name that the run knows has another answer: its configuration is the same.
    held["data"]["train_files"] = [str(edited)]
    (workdir / "config.json").write_text(json.dumps(held))
    edits = overrides | {"data.train_files": (str(edited),), "trainer.num_steps": 2}
    before = helpers.tree_digest(workdir)
    result = helpers.run_train(workdir, edits)
    assert result.code == 2 and result.err.count("\n") == 1
    assert result.err.startswith(f"error: data.train_files=('{edited}',): gives other prompts than those")
    assert "checkpoint.resume=force" in result.err and helpers.tree_digest(workdir) == before
    # With force it goes on, and what else has changed is heeded: the coefficient begins anew, groups are dropped.
    others = {"algorithm.kl_coef": 0.25, "algorithm.group_size": 2}
    out = helpers.train_ok(workdir, edits | others | {"checkpoint.resume": "force"})
    assert "WARNING: data.train_files=" in out and "gives other prompts" in out
    assert "groups that dynamic sampling had left over are dropped" in out
    line = helpers.read_lines(workdir)[-1]
    assert line["kl/coef"] == 0.25 and line["dynamic/num_carried"] == 0
    records = helpers.read_jsonl(workdir / "rollouts" / "step-000002.jsonl")
    assert len([r for r in records if not r.get("is_dropped")]) == 4 * 2
    # From now on it is a run with these data.
    out = helpers.train_ok(workdir, edits | others | {"trainer.num_steps": 3})
    assert "gives other prompts" not in out and "Going on after step 2 of 3." in out


def test_groups_of_another_reward_are_dropped_by_name(begun, overrides, tmp_path):
    """Their rewards mean something else, and lack parts of the new ones."""
    workdir, kept = copy_of(begun, tmp_path), progress(begun, 1)["surplus"]
    assert kept
    others = {"reward.extra_functions": "('gsm8k_format',)", "checkpoint.resume": "force"}
    out = helpers.train_ok(workdir, overrides | others | {"trainer.num_steps": 2})
    names = ", ".join(entry["prompt_id"] for entry in kept)
    assert f"{len(kept)} of the {len(kept)} groups that dynamic sampling had left over are dropped" in out
    assert f"or the reward are others than theirs ({names})." in out
    assert helpers.read_lines(workdir)[-1]["dynamic/num_carried"] == 0


def test_other_prompts_are_nothing_to_a_run_without_a_checkpoint(begun, overrides, tmp_path):
    workdir = copy_of(begun, tmp_path)
    shutil.rmtree(workdir / "checkpoints")
    content = json.loads((workdir / "beginning.json").read_text())
    (workdir / "beginning.json").write_text(json.dumps(content | {"prompts": "of other prompts"}))
    helpers.train_ok(workdir, overrides)
    assert json.loads((workdir / "beginning.json").read_text()) == content


def test_a_fixed_coefficient_is_the_configured_one(overrides, tmp_path):
    adaptive = ("algorithm.kl_target", "algorithm.kl_horizon")
    fixed = {key: value for key, value in overrides.items() if key not in adaptive}
    workdir = tmp_path / "run"
    helpers.train_ok(workdir, fixed)
    assert progress(workdir, 1)["kl_coef"] == 0.5
    changed = {"algorithm.kl_coef": 0.25, "checkpoint.resume": "force", "trainer.num_steps": 2}
    helpers.train_ok(workdir, fixed | changed)
    assert progress(workdir, 2)["kl_coef"] == 0.25


def test_a_damaged_beginning_is_named(begun, overrides, tmp_path):
    workdir = copy_of(begun, tmp_path)
    for manifest in workdir.glob("checkpoints/*/manifest.json"):
        manifest.unlink()  # which knows it too
    for content in ("{", "[]", '{"date": "yesterday", "prompts": ""}', '{"date": "2024-02-29"}'):
        (workdir / "beginning.json").write_text(content)
        result = helpers.run_train(workdir, overrides)
        assert result.code == 2 and result.err.count("\n") == 1
        assert "--workdir=" in result.err and "beginning.json that cannot be read" in result.err
