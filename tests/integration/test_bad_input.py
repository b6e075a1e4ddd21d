"""Whatever a user gets wrong: one line that names key, value and rule, exit code 2, nothing written, no device.

The rows are in `bad_input_table.py` and `bad_input_commands.py`. All but a few run in one process whose JAX
platform does not exist, so that touching a device would show as a different error; two are started again as
processes of their own. Those that are noticed on devices run in this process.
"""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import integration_helpers as helpers
import pytest
from bad_input_commands import TABLE
from bad_input_files import make_all

from grpo_jax.run.workdir import start_logging

HERE = Path(__file__).parent
WITHOUT_DEVICE = [case.name for case in TABLE.values() if not case.needs_device]
ON_DEVICES = [case.name for case in TABLE.values() if case.needs_device]


@pytest.fixture(scope="module")
def root(tmp_path_factory, model_folder):
    """The folder that the cases run in; all paths of the table are relative to it."""
    root = tmp_path_factory.mktemp("bad_input")
    make_all(root / "inputs", model_folder)
    return root


NO_DEVICE = {"JAX_PLATFORMS": "no_such_platform", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def results(root):
    finished = subprocess.run(
        [sys.executable, str(HERE / "bad_input_runner.py"), "."],
        input=json.dumps({name: (TABLE[name].module, TABLE[name].argv) for name in WITHOUT_DEVICE}),
        capture_output=True,
        text=True,
        cwd=root,
        env=os.environ | NO_DEVICE,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def check_line(name, code, err):
    assert code == 2, err
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    assert len(err) < 1500
    for part in TABLE[name].expected:
        assert part in err


def test_there_are_many():
    assert len(TABLE) >= 200
    assert len({case.module for case in TABLE.values()}) == 12  # all commands


@pytest.mark.parametrize("name", WITHOUT_DEVICE)
def test_one_line_exit_code_2_and_nothing_written(name, results):
    check_line(name, results[name]["code"], results[name]["err"])
    assert results[name]["unchanged"]


@pytest.mark.parametrize("name", ON_DEVICES)
def test_so_it_is_on_devices(name, root, monkeypatch):
    monkeypatch.chdir(root)
    case, before = TABLE[name], helpers.tree_digest(root)
    result = helpers.call(importlib.import_module(case.module).main, case.argv)
    start_logging(console=False)  # what comes later is not for this run's log
    check_line(name, result.code, result.err)
    assert case.writes or helpers.tree_digest(root) == before


@pytest.mark.parametrize("name", ["model-truncated", "evaluate-misspelt-flag"])
def test_so_it_is_for_a_process(name, root):
    before = helpers.tree_digest(root)
    case = TABLE[name]
    finished = subprocess.run(
        [sys.executable, "-m", case.module, *case.argv],
        capture_output=True,
        text=True,
        cwd=root,
        env=os.environ | NO_DEVICE,
    )
    check_line(name, finished.returncode, finished.stderr)
    assert helpers.tree_digest(root) == before
