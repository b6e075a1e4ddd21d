"""What pip, PyTorch, CUDA, JAX and vLLM say when something is broken or too small, and what mends it.

Text in, remedy out: nothing is run or imported. Both the doctor and a run whose engine does not start ask here.
"""

import re
from typing import NamedTuple

RECOMMENDED = "0.25.1"
"""The vLLM to install where there is none yet."""
OLDEST_DRIVER = {12: "525", 13: "580"}
"""CUDA's major version -> the oldest driver of NVIDIA's for it."""


class Remedy(NamedTuple):
    """What is wrong, and what mends it."""

    what: str
    mend: str


class Symptom(NamedTuple):
    """A line of the table."""

    pattern: str
    """A regular expression for a part of the message. Case counts."""
    what: str
    mend: str
    """Has {pip}, {vllm}, {ray}, {driver}, and {0}, {1}, ... for the groups of the pattern."""


ANEW = "{pip} install --force-reinstall 'vllm=={vllm}'"
AGAIN = "{pip} install 'vllm=={vllm}'"
WHEEL = "{pip} install -U pip && {pip} install --only-binary=:all: 'vllm=={vllm}'"
NO_DRIVER = "install the driver, or start the container with --gpus all"
DRIVER = (
    "install NVIDIA's driver {driver} or newer; where you may not, vLLM's build for yours: {pip} install uv && uv "
    "pip install 'vllm=={vllm}' --torch-backend=auto"
)

SYMPTOMS = (
    # Two things at once: the narrower one comes first.
    Symptom(
        r"undefined symbol: (nccl\w+)",
        "another NCCL lies over the one of PyTorch, which has no {0}",
        "{pip} uninstall -y nvidia-nccl-cu12 nvidia-nccl-cu13 && {pip} install 'vllm=={vllm}'",
    ),
    Symptom(
        r"version `(GLIBC\w*_[\d.]+)' not found",
        "this Linux is older than the wheel, which needs {0}",
        "run it on Ubuntu 22.04 or newer, or in vLLM's container",
    ),
    Symptom(
        r"libcuda\.so\.1: cannot open shared object",
        "NVIDIA's driver is not here",
        NO_DRIVER,
    ),
    Symptom(
        r"(lib(?:cudart|cublas\w*|cudnn\w*|nvrtc|cusparse\w*|cufft|curand|cusolver|nvJitLink|nccl|cupti)\.so\.\d+)"
        r"\S*: cannot open shared object",
        "vLLM and PyTorch are built for different versions of CUDA: {0} is not here",
        ANEW,
    ),
    Symptom(
        r"operator torchvision::nms does not exist",
        "torchvision was built for another PyTorch",
        ANEW,
    ),
    Symptom(
        r"undefined symbol: \S+|'_OpNamespace' '_\w*C\w*' object has no attribute|No module named 'vllm\._\w*C",
        "vLLM's compiled part does not fit the installed PyTorch, which something else has replaced",
        ANEW,
    ),
    Symptom(
        r"NVIDIA driver on your system is too old \(found version (\d+)\)"
        r"|CUDA driver version is insufficient for CUDA runtime version",
        "the driver is older than the CUDA of PyTorch",
        DRIVER,
    ),
    Symptom(
        r"Error 803: system has unsupported display driver|kernel version \S+ does not match DSO version",
        "the driver in the kernel and its libraries are of different versions",
        "restart the machine, or take other drivers' folders out of LD_LIBRARY_PATH",
    ),
    Symptom(
        r"Error 804: forward compatibility was attempted",
        "the libraries of cuda-compat are found, and this GPU cannot use them",
        "take the folder of cuda-compat out of LD_LIBRARY_PATH",
    ),
    Symptom(
        r"Error 802: system not yet initialized|CUDA_ERROR_SYSTEM_NOT_READY",
        "NVIDIA's fabric manager does not run",
        "sudo systemctl start nvidia-fabricmanager",
    ),
    Symptom(
        r"JAX plugin (jax_cuda\d+_plugin) version (\S+) is installed, but it is not compatible with the installed "
        r"jaxlib version ([\d.]*\d)|Mismatched PJRT plugin PJRT API version",
        "JAX's CUDA plugin is not of jaxlib's version",
        "pip install -U 'jax[cuda13]'",
    ),
    Symptom(
        r"AF_UNIX path length cannot exceed \d+ bytes",
        "the path of Ray's sockets is too long",
        "export RAY_TMPDIR=/tmp",
    ),
    # pip, which says most of it at once
    Symptom(
        r"CUDA_HOME (?:environment variable )?is not set|Cannot find CUDA_HOME|Failed to find nvcc"
        r"|No such file or directory: '\S*nvcc'|No CMAKE_CUDA_COMPILER could be found"
        r"|Failed to detect a default CUDA architecture",
        "pip builds vLLM from its source, and there is no CUDA compiler; the wheel needs none",
        WHEEL,
    ),
    Symptom(
        r"detected CUDA version \(\S+\) mismatches the version that was used to compile",
        "pip builds vLLM from its source, with another CUDA than PyTorch's; the wheel needs no compiler",
        WHEEL,
    ),
    Symptom(
        r"Failed building wheel for vllm|Could not build wheels for vllm"
        r"|Building (?:wheel|editable) for vllm \(pyproject\.toml\) did not run successfully",
        "pip builds vLLM from its source",
        WHEEL,
    ),
    Symptom(
        r"No matching distribution found for vllm|satisfies the requirement vllm",
        "there is no wheel of vLLM for this Python or this machine",
        "python3.12 -m venv engine && engine/bin/pip install vllm=={vllm} ray=={ray}, on Linux (x86-64 or ARM), "
        "and --config.rollout.python=engine/bin/python",
    ),
    Symptom(
        r"vllm \S+ requires ([\w.-]+?)[<>=!~]\S*, but you have \S+ \S+ which is incompatible",
        "{0} is outside of vLLM's range",
        AGAIN,
    ),
    Symptom(
        r"ResolutionImpossible|Cannot install [\s\S]{0,2000}?conflicting dependencies",
        "no versions fit all that pip was asked for",
        "ask pip for fewer packages, or without their versions; where vLLM is among them, give it an environment "
        "(python -m venv engine && engine/bin/pip install vllm=={vllm} ray=={ray}), and "
        "--config.rollout.python=engine/bin/python",
    ),
    # Memory
    Symptom(
        r"No available memory for the cache blocks",
        "vLLM has no memory left beside the model",
        "a higher rollout.gpu_memory_utilization, or a shorter data.max_prompt_length or data.max_response_length",
    ),
    Symptom(
        r"RESOURCE_EXHAUSTED: Out of memory",
        "JAX has run out of the device's memory",
        "python -m grpo_jax.plan with the flags of the run says which settings make it fit; "
        "docs/troubleshooting.md, Out of memory",
    ),
    # Python packages
    Symptom(
        r"Numba needs NumPy ([\d.]*\d) or less",
        "NumPy is newer than vLLM's numba allows",
        "{pip} install 'numpy=={0}.*'",
    ),
    Symptom(
        r"module that was compiled using NumPy 1\.x cannot be run|numpy\.dtype size changed",
        "a package was built for another NumPy",
        ANEW,
    ),
    Symptom(
        r"Protobuf Gencode/Runtime[\s\S]{0,300}?gencode (\d[\d.]*\d)",
        "protobuf is older than what vLLM's files were made with",
        "{pip} install 'protobuf>={0}'",
    ),
    Symptom(
        r"Descriptors cannot (?:not )?be created directly", "protobuf is newer than a package allows", ANEW
    ),
    Symptom(
        r"cannot import name '?\w+'? from '?transformers|TokenizersBackend has no attribute"
        r"|already used by a Transformers config",
        "transformers is outside of vLLM's range",
        AGAIN,
    ),
    Symptom(
        r"Failed to infer device type",
        "vLLM sees no GPU",
        "make nvidia-smi work here (in a container: --gpus all)",
    ),
    Symptom(r"No module named '([\w.]+)'", "{0} is missing", AGAIN),
)


def find_remedy(
    text: str, *, pip: str = "pip", vllm: str = RECOMMENDED, ray: str = "2.60.0"
) -> Remedy | None:
    """What a message means. Where several lines of the table fit, the first one counts. None: nothing is known.

    Args:
        pip: the command of the environment in question.
        vllm, ray: versions that it has, or is to have.
    """
    for symptom in SYMPTOMS:
        if match := re.search(symptom.pattern, text):
            words = [group or "" for group in match.groups()]
            names = {"pip": pip, "vllm": vllm, "ray": ray, "driver": OLDEST_DRIVER[13]}
            return Remedy(symptom.what.format(*words, **names), symptom.mend.format(*words, **names))
    return None
