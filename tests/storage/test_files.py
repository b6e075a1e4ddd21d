"""Files and folders that are there whole or not at all."""

import os
import signal
import subprocess
import sys

import pytest

from grpo_jax.storage.files import replace_folder, sweep, temporary_beside, write_whole


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_no_two_temporary_names_are_the_same(tmp_path):
    path = tmp_path / "model"
    made = {temporary_beside(path) for _ in range(100)}
    assert len(made) == 100
    assert all(temporary.parent == tmp_path and temporary.name.startswith("model.") for temporary in made)


def test_a_text_file_is_written_or_stays_as_it_was(tmp_path):
    file = tmp_path / "config.json"
    write_whole(file, "old")
    assert file.read_text() == "old"
    with pytest.raises(UnicodeEncodeError):  # fails half way
        write_whole(file, "new \ud800")
    assert file.read_text() == "old" and names(tmp_path) == ["config.json"]
    write_whole(file, "new")
    assert file.read_text() == "new" and names(tmp_path) == ["config.json"]


def test_a_kill_while_writing_leaves_what_was_there(tmp_path):
    """The process dies at its first fsync: all is written, nothing is named."""
    file = tmp_path / "beginning.json"
    file.write_text("old")
    code = f"""
import os, pathlib, signal
from grpo_jax.storage.files import write_whole
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
write_whole(pathlib.Path({str(file)!r}), "new")
"""
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == -signal.SIGKILL
    assert file.read_text() == "old"
    assert len(names(tmp_path)) == 2
    sweep(tmp_path)
    assert names(tmp_path) == ["beginning.json"]


def test_a_folder_takes_the_place_of_another(tmp_path):
    target = tmp_path / "checkpoint-epoch-1"
    for content in ("first", "second"):
        temporary = temporary_beside(target)
        (temporary / "inner").mkdir(parents=True)
        (temporary / "inner" / content).write_text(content)
        replace_folder(temporary, target)
        assert names(tmp_path) == ["checkpoint-epoch-1"] and names(target / "inner") == [content]


def test_only_temporary_names_are_swept(tmp_path):
    (tmp_path / "sft-model.tmp" / "inner").mkdir(parents=True)  # as older versions named it
    (tmp_path / "4.0123456789ab.tmp.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "metrics.jsonl.0123456789ab.tmp").write_text("")
    (tmp_path / "6.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "4").mkdir()
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "tmp").mkdir()
    outside = tmp_path / "4" / "kept"
    outside.mkdir()
    (tmp_path / "link.tmp").symlink_to(outside)
    sweep(tmp_path)
    assert names(tmp_path) == ["4", "metrics.jsonl", "tmp"] and outside.is_dir()
    sweep(tmp_path / "not there")
