"""Messages of broken installations, as people have reported them, and what is to be done."""

import re

import pytest

from grpo_jax.rollout.remedies import SYMPTOMS, find_remedy

ANEW = "PIP install --force-reinstall 'vllm==0.25.1'"
AGAIN = "PIP install 'vllm==0.25.1'"
WHEEL = "PIP install -U pip && PIP install --only-binary=:all: 'vllm==0.25.1'"

TRUE_TEXTS = [  # what was said, a part of what is wrong, the command
    ("ImportError: /env/site-packages/torch/lib/libtorch_cuda.so: undefined symbol: ncclCommResume",
     "has no ncclCommResume",
     "PIP uninstall -y nvidia-nccl-cu12 nvidia-nccl-cu13 && PIP install 'vllm==0.25.1'"),
    ("ImportError: /env/lib/vllm/_C.abi3.so: undefined symbol: _ZN5torch3jit17parseSchemaOrNameERKSsb",
     "does not fit the installed PyTorch", ANEW),
    ("WARNING 06-13 11:42:20 _custom_ops.py:11] Failed to import from vllm._C with ImportError('/env/vllm/_C.abi3.so: "
     "undefined symbol: _ZN5torch7LibraryC1ENS0_4KindESsSt8optionalIN3c1011DispatchKeyEEPKcj')",
     "does not fit the installed PyTorch", ANEW),
    ("AttributeError: '_OpNamespace' '_C' object has no attribute 'rms_norm'", "compiled part", ANEW),
    ("ModuleNotFoundError: No module named 'vllm._C'", "compiled part", ANEW),
    ("Failed to import from vllm._C_stable_libtorch: ModuleNotFoundError(\"No module named 'vllm._C_stable_libtorch'\")",
     "compiled part", ANEW),
    ("RuntimeError: operator torchvision::nms does not exist", "torchvision", ANEW),
    ("ImportError: libcudart.so.12: cannot open shared object file: No such file or directory",
     "libcudart.so.12 is not here", ANEW),
    ("ImportError: libcudart.so.11.0: cannot open shared object file: No such file or directory",
     "libcudart.so.11 is not here", ANEW),
    ("OSError: libcuda.so.1: cannot open shared object file: No such file or directory", "driver is not here",
     "install the driver, or start the container with --gpus all"),
    ("ImportError: /lib64/libc.so.6: version `GLIBC_2.32' not found (required by /env/vllm/_C.abi3.so)", "GLIBC_2.32",
     "run it on Ubuntu 22.04 or newer, or in vLLM's container"),
    ("RuntimeError: The NVIDIA driver on your system is too old (found version 12080). Please update your GPU driver",
     "older than the CUDA of PyTorch", "--torch-backend=auto"),
    ("RuntimeError: CUDA error: CUDA driver version is insufficient for CUDA runtime version", "older", "driver 580"),
    ("RuntimeError: Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling "
     "NumCudaDevices() that might have already set an error? Error 803: system has unsupported display driver / cuda "
     "driver combination", "different versions", "LD_LIBRARY_PATH"),
    ("cuda_diagnostics.cc:312] kernel version 470.182.3 does not match DSO version 520.61.5 -- cannot find working "
     "devices in this configuration", "different versions", "restart the machine"),
    ("Error 804: forward compatibility was attempted on non supported HW", "cuda-compat", "LD_LIBRARY_PATH"),
    ("failed call to cuInit: INTERNAL: CUDA error: Failed call to cuInit: CUDA_ERROR_SYSTEM_NOT_READY: system not yet "
     "initialized", "fabric manager", "sudo systemctl start nvidia-fabricmanager"),
    ("RuntimeWarning: JAX plugin jax_cuda12_plugin version 0.4.30 is installed, but it is not compatible with the "
     "installed jaxlib version 0.4.31, so it will not be used.", "plugin", "pip install -U 'jax[cuda13]'"),
    ("RuntimeError: Unable to initialize backend 'cuda': INVALID_ARGUMENT: Mismatched PJRT plugin PJRT API version "
     "(0.54) and framework PJRT API version 0.51).", "plugin", "pip install -U 'jax[cuda13]'"),
    ("  × Getting requirements to build wheel did not run successfully.\n      AssertionError: CUDA_HOME is not set",
     "no CUDA compiler", WHEEL),
    ("OSError: CUDA_HOME environment variable is not set. Please set it to your CUDA install root.", "compiler", WHEEL),
    ("FileNotFoundError: [Errno 2] No such file or directory: '/usr/local/cuda/bin/nvcc'", "no CUDA compiler", WHEEL),
    ("      RuntimeError:\n      The detected CUDA version (12.2) mismatches the version that was used to compile\n"
     "      PyTorch (11.7). Please make sure to use the same CUDA versions.", "another CUDA than PyTorch's", WHEEL),
    ("  × Building wheel for vllm (pyproject.toml) did not run successfully.\n  │ exit code: 1", "its source", WHEEL),
    ("ERROR: Failed building wheel for vllm", "its source", WHEEL),
    ("ERROR: Could not build wheels for vllm, which is required to install pyproject.toml-based projects",
     "its source", WHEEL),
    ("ERROR: Could not find a version that satisfies the requirement vllm==0.25.1 (from versions: none)\n"
     "ERROR: No matching distribution found for vllm==0.25.1", "no wheel of vLLM for this Python",
     "python3.12 -m venv engine && engine/bin/pip install vllm==0.25.1 ray==2.60.0"),
    ("vllm 0.16.0+cu130 requires transformers<5,>=4.56.0, but you have transformers 5.2.0 which is incompatible.",
     "transformers is outside", AGAIN),
    ("vllm 0.8.5+cu118 requires opencv-python-headless>=4.11.0, but you have opencv-python-headless 4.6.0 which is "
     "incompatible.", "opencv-python-headless is outside", AGAIN),
    ("ImportError: Numba needs NumPy 2.2 or less. Got NumPy 2.3.", "numba", "PIP install 'numpy==2.2.*'"),
    ("A module that was compiled using NumPy 1.x cannot be run in\nNumPy 2.2.6 as it may crash.", "another NumPy", ANEW),
    ("google.protobuf.runtime_version.VersionError: Detected incompatible Protobuf Gencode/Runtime versions when "
     "loading backend.proto: gencode 7.35.0 runtime 6.33.6", "protobuf is older", "PIP install 'protobuf>=7.35.0'"),
    ("Detected mismatched Protobuf Gencode/Runtime major versions when loading a2a.proto: gencode 6.31.1 runtime "
     "5.29.5. Same major version is required.", "protobuf is older", "PIP install 'protobuf>=6.31.1'"),
    ("TypeError: Descriptors cannot not be created directly.", "protobuf is newer", ANEW),
    ("TypeError: Descriptors cannot be created directly.", "protobuf is newer", ANEW),
    ("ImportError: cannot import name 'DeepseekV2Config' from 'transformers' (/env/transformers/__init__.py)",
     "transformers is outside", AGAIN),
    ("ImportError: cannot import name 'LlamaFlashAttention2' from 'transformers.models.llama.modeling_llama'",
     "transformers is outside", AGAIN),
    ("AttributeError: TokenizersBackend has no attribute all_special_tokens_extended", "transformers", AGAIN),
    ("OSError: AF_UNIX path length cannot exceed 107 bytes: '/home/somebody/a/long/path/ray/session/sockets/plasma_store'",
     "too long", "export RAY_TMPDIR=/tmp"),
    ("RuntimeError: Failed to infer device type", "sees no GPU", "make nvidia-smi work here"),
    ("ERROR: Cannot install grpo_jax and vllm==0.25.1 because these package versions have conflicting dependencies.",
     "no versions fit", "--config.rollout.python=engine/bin/python"),
    ("ERROR: ResolutionImpossible: for help visit https://pip.pypa.io/en/latest/topics/dependency-resolution",
     "no versions fit", "engine/bin/pip install vllm==0.25.1 ray==2.60.0"),
    ("ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization` when initializing "
     "the engine.", "no memory left beside the model", "a higher rollout.gpu_memory_utilization"),
    ("jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory while trying to allocate 25769803776 bytes.",
     "out of the device's memory", "python -m grpo_jax.plan"),
    ("ModuleNotFoundError: No module named 'cachetools'", "cachetools is missing", AGAIN),
]  # fmt: skip


@pytest.mark.parametrize(("text", "what", "mend"), TRUE_TEXTS, ids=[text[:40] for text, *_ in TRUE_TEXTS])
def test_a_message_that_is_known_comes_with_its_command(text, what, mend):
    log = f"INFO all is well\n{text}\nSee above for output.\n"
    remedy = find_remedy(log, pip="PIP", vllm="0.25.1", ray="2.60.0")
    assert what in remedy.what and mend in remedy.mend
    assert remedy.mend == mend or mend not in (ANEW, AGAIN, WHEEL)
    assert "{" not in remedy.what + remedy.mend and "\n" not in remedy.what + remedy.mend


def test_every_line_of_the_table_has_a_message():
    heard = {next(s.pattern for s in SYMPTOMS if re.search(s.pattern, text)) for text, *_ in TRUE_TEXTS}
    assert heard == {symptom.pattern for symptom in SYMPTOMS}


def test_what_nobody_knows_comes_without():
    assert find_remedy("ValueError: what nobody knows") is None
    assert find_remedy("") is None
    assert find_remedy("Successfully installed torch-2.11.0 vllm-0.25.1") is None
