"""Whatever becomes of a workdir's files: a good checkpoint is found, or one line says that there is none.

The examples are random, and the same in every run.
"""

import json
import shutil

import fuzz_helpers as fuzz
import pytest
from config_helpers import gsm8k
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax.config import ConfigError
from grpo_jax.run.checkpoint import find_checkpoint
from grpo_jax.run.workdir import Workdir
from grpo_jax.storage.manifest import damage, write_manifest

STEPS = (2, 4)


@pytest.fixture
def workdir(tmp_path):
    """A run's folder as it is after four steps; its checkpoints have the files of Orbax's, in small."""
    config, workdir = gsm8k(), Workdir(tmp_path / "run")
    beginning = {"date": "2026-01-02T03:04:05", "prompts": "f" * 64}
    for step in STEPS:
        folder = workdir.checkpoints / str(step)
        for name in ("params/d/array", "params/_METADATA", "optimizer/d/array", "progress/metadata"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(f"{name} {step}".encode() * 9)
        (folder / "progress" / "metadata").write_text(json.dumps({"global_step": step, "has_manifest": True}))
        facts = {
            "config": config.to_dict(),
            "beginning": beginning,
            "step": step,
            "epoch": None,
            "metrics": {},
        }
        write_manifest(folder, facts)
    workdir.record(config)
    workdir.beginning.write_text(json.dumps(beginning))
    return workdir


def is_same(content, whole):
    """Whether a file says what it did: a manifest may be laid out otherwise."""
    try:
        return content == whole or (content is not None and json.loads(content) == json.loads(whole))
    except ValueError:
        return False


def read(workdir):
    """What a run, and an export, read of a folder before they go on."""
    config = gsm8k()
    workdir.check(config)
    workdir.read_beginning(is_forced=False)
    return find_checkpoint(workdir.path)


@fuzz.lengths(15, 500)
def test_a_damaged_checkpoint_is_never_taken(num_examples, workdir, tmp_path):
    files = [path for path in workdir.checkpoints.rglob("*") if path.is_file()]
    contents = {path: path.read_bytes() for path in files}
    copy = shutil.copytree(workdir.checkpoints, tmp_path / "copy")

    @settings(fuzz.STEADY, max_examples=num_examples)
    @given(data=st.data())
    def holds(data):
        shutil.rmtree(workdir.checkpoints)
        shutil.copytree(copy, workdir.checkpoints)
        changed = set()
        for path in data.draw(st.lists(st.sampled_from(files), min_size=1, max_size=2, unique=True)):
            kind = data.draw(st.sampled_from(["damage"] * 4 + ["gone", "folder"]))
            content = data.draw(fuzz.damages(contents[path])) if kind == "damage" else None
            path.unlink()
            if content is not None:
                path.write_bytes(content)
            elif kind == "folder":
                path.mkdir()
            if not is_same(content, contents[path]):
                changed.add(int(path.relative_to(workdir.checkpoints).parts[0]))
        try:
            assert int(find_checkpoint(workdir.path).name) == max(set(STEPS) - changed)
        except ConfigError as error:
            fuzz.check_refusal(error)
            assert changed == set(STEPS)

    holds()


@fuzz.lengths(15, 500)
@pytest.mark.parametrize("name", ["config.json", "beginning.json", "lock", "manifest.json", "progress"])
def test_files_of_any_content(num_examples, name, workdir):
    last = workdir.checkpoints / "4"
    inside = {"manifest.json": last / name, "progress": last / "progress" / "metadata"}
    file = inside.get(name, workdir.path / name)
    content = file.read_bytes() if file.exists() else b"{}"
    held = json.loads(content)
    fields = list(held) or ["pid"]
    shaped = st.dictionaries(st.sampled_from(fields), fuzz.JSON, max_size=2).map(lambda new: held | new)

    @settings(fuzz.STEADY, max_examples=num_examples)
    @given(new=fuzz.damages(content) | (fuzz.JSON | shaped).map(lambda v: json.dumps(v).encode()))
    def holds(new):
        file.write_bytes(new)
        try:
            assert not damage(read(workdir))
        except ConfigError as error:
            fuzz.check_refusal(error)

    holds()


NAMES = st.sampled_from(["04", "²", "٤", "-1", "1e3", "4.tmp", "x", "4 ", "+4", "4_0"])


@fuzz.lengths(10, 200)
def test_names_that_are_no_steps(num_examples, workdir):
    @settings(fuzz.STEADY, max_examples=num_examples)
    @given(names=st.sets(NAMES, min_size=1, max_size=3), is_file=st.booleans())
    def holds(names, is_file):
        for name in names:
            path = workdir.checkpoints / name
            path.write_text("") if is_file else path.mkdir()
        try:
            assert find_checkpoint(workdir.path).name == "4"
        finally:
            for name in names:
                path = workdir.checkpoints / name
                path.unlink() if is_file else path.rmdir()

    holds()
