"""What a crash of the machine leaves of config.json and beginning.json stops nothing without reason."""

import json
import shutil

import integration_helpers as helpers
import pytest

from grpo_jax import evaluate, export

DAMAGES = {"empty": "", "cut short": '{"model": {"pa', "zeroed": "\0" * 50}
NAMES = ("config.json", "beginning.json")


@pytest.fixture
def workdir(tmp_path, whole_run):
    return shutil.copytree(whole_run[0], tmp_path / "run")


def forget(workdir):
    """Makes the checkpoints those of a version without manifests."""
    for step in (workdir / "checkpoints").iterdir():
        (step / "manifest.json").unlink()
        metadata = step / "progress" / "metadata"
        progress = json.loads(metadata.read_text())
        del progress["has_manifest"]
        metadata.write_text(json.dumps(progress))


@pytest.mark.parametrize("kind", DAMAGES)
def test_the_last_checkpoint_knows_what_they_held(kind, workdir, tmp_path, whole_run, whole_run_overrides):
    for name in NAMES:
        (workdir / name).write_text(DAMAGES[kind])
    result = helpers.call(export.main, [f"--checkpoint={workdir}", f"--output={tmp_path / 'out'}"])
    assert result.code == 0, result.err
    assert helpers.read_tensors(tmp_path / "out") == helpers.read_tensors(workdir / "checkpoint-epoch-2")

    result = helpers.run_train(workdir, whole_run_overrides | {"optim.learning_rate": 0.005})
    assert result.code == 2 and "optim.learning_rate=0.005: the run in" in result.err  # is guarded as before
    out = helpers.train_ok(workdir, whole_run_overrides)
    assert "This run is finished" in out
    for name in NAMES:
        assert (workdir / name).read_bytes() == (whole_run[0] / name).read_bytes()


def test_empty_ones_are_none_where_there_is_no_checkpoint(tmp_path, whole_run_overrides):
    (tmp_path / "run").mkdir()
    for name in NAMES:
        (tmp_path / "run" / name).write_text("")
    helpers.train_ok(tmp_path / "run", whole_run_overrides | {"trainer.num_steps": 1})
    assert json.loads((tmp_path / "run" / "config.json").read_text())["trainer"]["num_steps"] == 1
    assert json.loads((tmp_path / "run" / "beginning.json").read_text())["prompts"]


@pytest.mark.parametrize("name", NAMES)
def test_what_nobody_knows_is_named_with_the_way_out(name, workdir, tmp_path, whole_run_overrides):
    forget(workdir)
    (workdir / name).write_text("")
    result = helpers.run_train(workdir, whole_run_overrides)
    assert result.code == 2 and result.err.count("\n") == 1
    assert f"holds a {name} that cannot be read" in result.err and "checkpoint.resume=force" in result.err
    out = helpers.train_ok(workdir, whole_run_overrides | {"checkpoint.resume": "force"})
    assert "This run is finished" in out and "cannot be verified" in out
    assert json.loads((workdir / name).read_text())


def test_export_without_a_config_is_one_line(workdir, tmp_path):
    forget(workdir)
    for content in ("", None):
        (workdir / "config.json").unlink() if content is None else (workdir / "config.json").write_text(
            content
        )
        result = helpers.call(export.main, [f"--checkpoint={workdir}", f"--output={tmp_path / 'out'}"])
        assert result.code == 2 and len([line for line in result.err.splitlines() if "error" in line]) == 1
        assert "config.json" in result.err and not (tmp_path / "out").exists()


def test_evaluate_finds_a_flipped_byte_of_the_weights(workdir):
    model = workdir / "checkpoint-epoch-2"
    argv = [f"--model={model}", f"--data={workdir / 'data' / 'val.parquet'}", "--max_response_length=4"]
    (model / "README.md").write_text("a person may add and change what is not weights")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config))
    result = helpers.call(evaluate.main, argv)
    assert result.code == 0, result.err
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    result = helpers.call(evaluate.main, argv)
    assert result.code == 2 and result.err.count("\n") == 1
    assert "--model=" in result.err and "model.safetensors holds other bytes than were written" in result.err
