"""An sdist and a wheel are built and installed, and work where there is no clone. No network."""

import filecmp
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEFT_OUT = (
    ".git",
    ".ci-venv*",
    ".venv*",
    "*.egg-info",
    "__pycache__",
    ".*_cache",
    "outputs",
    "build",
    "dist",
)
SHIPPED = ("configs", "examples", "launch")


def call(*command, cwd, code=0):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"JAX_PLATFORMS": "cpu", "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder with an sdist, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("built")
    tree = folder / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*LEFT_OUT))
    build = "import setuptools.build_meta as backend; backend.build_sdist('..')"
    call(sys.executable, "-c", build, cwd=tree)
    (sdist,) = folder.glob("*.tar.gz")
    flags = ["--no-deps", "--no-build-isolation", "--wheel-dir", folder]
    call(sys.executable, "-m", "pip", "wheel", "-q", *flags, sdist, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def python(built):
    """The interpreter of an environment with the wheel, and the other packages of this one."""
    environment = built / "environment"
    call(sys.executable, "-m", "venv", "--without-pip", environment, cwd=built)
    (wheel,) = built.glob("*.whl")
    python = environment / "bin" / "python"
    call(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", wheel, cwd=built)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def test_the_wheel_holds_types_and_recipes_and_no_test(built):
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"grpo_jax/py.typed", "grpo_jax/_shipped/configs/gsm8k.py"} < set(names)
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {"grpo_jax"}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "grpo_jax").rglob("*.py")}
    assert modules <= set(names)


def test_the_sdist_holds_what_the_tests_need(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"configs/gsm8k.py", "launch/local.sh", "tests/test_packaging.py", "CHANGELOG.md"} < names


def test_commands_work_without_a_clone(python, tmp_path):
    done = call(python, "-c", "import grpo_jax; print(grpo_jax.__file__)", cwd=tmp_path)
    assert str(python.parent.parent) in done.stdout
    done = call(python, "-m", "grpo_jax.init", "mine", cwd=tmp_path)
    mine = tmp_path / "mine"
    files = {
        path.relative_to(ROOT)
        for name in SHIPPED
        for path in (ROOT / name).rglob("*.*")
        if path.suffix != ".pyc"
    }
    assert {path.relative_to(mine) for path in mine.rglob("*") if path.is_file()} == files
    assert f"mine: {len(files)} files copied" in done.stdout
    for path in files:
        assert filecmp.cmp(ROOT / path, mine / path, shallow=False)
        assert os.access(ROOT / path, os.X_OK) <= os.access(mine / path, os.X_OK)
    done = call(mine / "launch" / "local.sh", "--dry_run", "--config=configs/quickstart.py", cwd=tmp_path)
    assert done.stdout == "python -m grpo_jax.train --config=configs/quickstart.py\n"
    flags = ["--config=configs/quickstart.py", "--device=h100"]
    assert "parameters" in call(python, "-m", "grpo_jax.plan", *flags, cwd=mine).stdout


def test_init_leaves_what_is_the_same_and_refuses_what_differs(tmp_path):
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})"]
    command[2] += "; from grpo_jax.init import main; main()"
    call(*command, "mine", cwd=tmp_path)
    (tmp_path / "mine" / "configs" / "smollm.py").unlink()
    assert "mine: 1 files copied" in call(*command, "mine", cwd=tmp_path).stdout
    (tmp_path / "mine" / "configs" / "smollm.py").unlink()
    (tmp_path / "mine" / "configs" / "gsm8k.py").write_text("# my own\n")
    done = call(*command, "mine", cwd=tmp_path, code=2)
    assert (
        done.stderr
        == "error: FOLDER='mine/configs/gsm8k.py': is there already and differs; name another folder\n"
    )
    assert not (tmp_path / "mine" / "configs" / "smollm.py").exists()
    assert (tmp_path / "mine" / "configs" / "gsm8k.py").read_text() == "# my own\n"
    (tmp_path / "file").touch()
    assert "FOLDER='file': is a file" in call(*command, "file", cwd=tmp_path, code=2).stderr
    assert "arguments are required: FOLDER" in call(*command, cwd=tmp_path, code=2).stderr


def test_pre_commit_runs_what_ci_runs():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text().splitlines()
    entries = [line.partition("entry: ")[2] for line in hooks if "entry: " in line]
    script = (ROOT / ".ci" / "run").read_text()
    before_tests = [line for line in script.splitlines() if line.startswith(".ci-venv/bin/")]
    commands = [line.removeprefix(".ci-venv/bin/") for line in before_tests]
    assert entries == [command for command in commands if not command.startswith("python ")]


def test_one_version_and_one_licence():
    import grpo_jax

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = (ROOT / "CITATION.cff").read_text().splitlines()
    assert project["version"] == grpo_jax.__version__
    assert f"version: {project['version']}" in citation and f"license: {project['license']}" in citation
