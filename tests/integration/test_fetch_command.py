"""`python -m grpo_jax.fetch` against a small hub on this machine, as each of the clients asks for it."""

import os
import re
import shutil
import subprocess
import sys

import hub_server
import integration_helpers as helpers
import pytest

MB = 2**20
HUBS = (hub_server.HuggingFace, hub_server.ModelScope)


@pytest.fixture
def served(model_folder, tmp_path):
    """Starts hubs, of one model's folder each."""
    hubs = []

    def start(answers):
        folder = tmp_path / f"served-{len(hubs)}"
        shutil.copytree(model_folder, folder)
        (folder / "pytorch_model.bin").write_bytes(b"not for us")
        hubs.append(hub_server.Hub(folder, answers))
        return hubs[-1]

    yield start
    for hub in hubs:
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
        "MODELSCOPE_REPO_TREE_PAGE_MAX_ATTEMPTS": "1",  # otherwise seven seconds, and a line for each
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
    for name in ("tiny/other", "no name", "a/b/c"):
        assert line_of(fetch(hub, tmp_path, name=name)).startswith(
            f"error: NAME='{name}': the hub did not give it"
        )
    line = line_of(fetch(hub, tmp_path, "--revision=v9"))
    assert line.startswith(f"error: NAME='{hub_server.NAME}': the hub did not give it")
    (tmp_path / "got").write_text("")
    assert "is a file" in fetch(hub, tmp_path).stderr


def test_a_folder_with_another_model_is_left_as_it_is(hub, tmp_path):
    (tmp_path / "got").mkdir()
    (tmp_path / "got" / "config.json").write_text("{}")
    assert "holds another model: its config.json is not that of tiny/model" in line_of(fetch(hub, tmp_path))
    assert [path.name for path in (tmp_path / "got").iterdir()] == ["config.json"]
    assert (tmp_path / "got" / "config.json").read_text() == "{}"


def test_a_hub_that_cannot_be_reached_is_named(hub, tmp_path):
    closed = dict.fromkeys(hub.environment, "http://127.0.0.1:9")
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
