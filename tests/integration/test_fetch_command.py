"""`python -m grpo_jax.fetch` against a small hub on this machine, as each of the clients asks for it."""

import os
import re
import shutil
import subprocess
import sys

import hub_server
import integration_helpers as helpers
import pytest

from grpo_jax import fetch as fetch_command
from grpo_jax.config import ConfigError
from grpo_jax.storage import hubs

MB = 2**20
HUBS = (hub_server.HuggingFace, hub_server.ModelScope)


@pytest.fixture
def served(model_folder, tmp_path):
    """Starts hubs, of one model's folder each."""
    started = []

    def start(answers):
        folder = tmp_path / f"served-{len(started)}"
        shutil.copytree(model_folder, folder)
        (folder / "pytorch_model.bin").write_bytes(b"not for us")
        started.append(hub_server.Hub(folder, answers))
        return started[-1]

    yield start
    for hub in started:
        hub.shutdown()
        hub.server_close()


@pytest.fixture(params=HUBS, ids=lambda answers: answers.name)
def hub(request, served):
    return served(request.param)


WHOLE = pytest.mark.parametrize(
    "hub",
    [pytest.param(HUBS[0], id=HUBS[0].name), pytest.param(HUBS[1], id=HUBS[1].name, marks=pytest.mark.slow)],
    indirect=True,
)
"""A whole fetch from each hub, which ends with the model's own words; the default suite has one."""


def fetch(hub, tmp_path, *flags, name=hub_server.NAME, environment=()):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "MODELSCOPE_"))}
    own = {
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "MODELSCOPE_CACHE": str(tmp_path / "cache"),
        "MODELSCOPE_HOME": str(tmp_path / "home"),
        "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "1",  # otherwise seven seconds
        "TQDM_DISABLE": "1",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(helpers.ROOT),
    }
    command = [sys.executable, "-m", "grpo_jax.fetch", name, hub.flag, f"--to={tmp_path / 'got'}"]
    return subprocess.run(
        [*command, "--dtype=float32", *flags],
        capture_output=True, text=True, env=kept | own | hub.environment | dict(environment), timeout=120,
    )  # fmt: skip


def line_of(done):
    """The one line of a refusal."""
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@WHOLE
def test_a_model_is_fetched_checked_and_speaks(hub, tmp_path):
    done = fetch(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert hub.says in done.stdout
    assert "capital of France?" in done.stdout and "answer: '" in done.stdout
    got = {path.name: path.read_bytes() for path in (tmp_path / "got").iterdir() if path.is_file()}
    served = {path.name: path.read_bytes() for path in hub.folder.iterdir()}
    served.pop("pytorch_model.bin")
    assert got == served
    weights = tmp_path / "got" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "model.safetensors: not what the hub has" in line_of(fetch(hub, tmp_path, "--check_only"))
    (tmp_path / "got" / "tokenizer.json").unlink()
    weights.write_bytes(served["model.safetensors"])
    assert "lacks tokenizer.json" in line_of(fetch(hub, tmp_path, "--check_only"))


@WHOLE
def test_what_was_cut_short_goes_on(hub, tmp_path):
    notes = hub.folder / "notes.txt"
    notes.write_bytes(bytes(12 * MB))
    hub.digests["notes.txt"] = hub.digest_of(notes)
    hub.cut = 11 * MB  # a client keeps what it has in pieces, of 10 MB at most
    done = fetch(hub, tmp_path)
    if done.returncode:  # the client gave up: the same command goes on
        *told, line = done.stderr.splitlines()  # the client tells of each attempt before
        assert line.startswith("error: ") and line.endswith("again to go on") and "Traceback" not in told
        hub.cut = 0
        done = fetch(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    assert hub.ranges and min(hub.ranges) >= 10 * MB
    assert (tmp_path / "got" / "notes.txt").read_bytes() == notes.read_bytes()


def test_files_that_are_not_what_the_hub_says_are_refused(hub, tmp_path):
    hub.digests["config.json"] = "0" * len(hub.digests["config.json"])
    done = fetch(hub, tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    line = done.stderr.splitlines()[-1]  # ModelScope's client compares too, and tells of each attempt before
    assert line.startswith("error: ") and re.search(
        "config.json: (not what the hub has|.*Hash mismatch)", line
    )


def test_names_that_the_hub_does_not_have_end_in_one_line(hub, tmp_path):
    line = line_of(fetch(hub, tmp_path, name="tiny/other"))
    assert line.startswith("error: NAME='tiny/other': the hub did not give it")
    assert "check the name" in line and "again" not in line
    line = line_of(fetch(hub, tmp_path, "--revision=v9"))
    assert line.startswith(f"error: NAME='{hub_server.NAME}': the hub did not give it")
    (tmp_path / "got").write_text("")
    assert "is a file" in fetch(hub, tmp_path).stderr


@pytest.mark.parametrize("name", ["../../etc", "no name", "a/b/c", "gpt2", "/etc", "a/", "a/..", "models"])
def test_what_can_be_no_name_is_refused_before_the_hub_is_asked(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    result = helpers.call(fetch_command.main, [name, "--to=got"])
    assert result.code == 2 and result.err.startswith(
        f"error: NAME='{name}': must be OWNER/NAME, as the hub has it"
    )
    is_here = name in ("/etc", "models") or (name == "../../etc" and (tmp_path / name).exists())
    assert ("what is here already needs no fetching" in result.err) == is_here


def test_a_folder_here_of_a_name_that_the_hub_could_have(monkeypatch, tmp_path):
    """Only a hub that fails is told of it: the name may be a hub's all the same."""

    def fail():
        with hubs._one_line("own/model", tmp_path / "got"):
            raise ConnectionError("no network")

    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="run the same command again"):
        fail()
    (tmp_path / "own" / "model").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"\(no network\); the folder of that name which is here needs no"):
        fail()


def test_a_folder_with_another_model_is_left_as_it_is(hub, tmp_path):
    (tmp_path / "got").mkdir()
    (tmp_path / "got" / "config.json").write_text("{}")
    assert "holds another model: its config.json is not that of tiny/model" in line_of(fetch(hub, tmp_path))
    assert [path.name for path in (tmp_path / "got").iterdir()] == ["config.json"]
    assert (tmp_path / "got" / "config.json").read_text() == "{}"


def test_a_hub_that_cannot_be_reached_is_named(hub, tmp_path):
    closed = dict.fromkeys(hub.environment, "http://127.0.0.1:9")
    closed["MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS"] = "2"  # of which its client would tell by itself
    line = line_of(fetch(hub, tmp_path, environment=closed))
    assert "the hub did not give it (" in line and "refused" in line


def test_modelscope_without_its_package_says_what_to_install(served, tmp_path):
    (tmp_path / "modelscope_hub.py").write_text("raise ImportError\n")
    paths = os.pathsep.join([str(tmp_path), str(helpers.ROOT)])
    hub = served(hub_server.ModelScope)
    line = line_of(fetch(hub, tmp_path, environment={"PYTHONPATH": paths}))
    assert line == (
        "error: --from='modelscope': the package modelscope-hub is not installed: "
        "pip install 'modelscope-hub>=0.5.1'\n"
    )


def test_a_file_outside_of_the_folder_is_refused(served, tmp_path):
    line = line_of(fetch(served(hub_server.OutsideOfTheFolder), tmp_path))
    assert "names a file outside of the folder, '../config.json'" in line
    assert not (tmp_path / "config.json").exists() and not (tmp_path / "got").exists()
