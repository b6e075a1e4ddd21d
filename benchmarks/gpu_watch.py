"""What the GPUs did and held while something ran: NVML, read in a thread.

NVML's `utilization.gpu` is the share of its last sampling period (1 s at most, as NVIDIA describes it) in which a
kernel of any process ran; its mean over a span of time is therefore the share of it in which the GPU worked. The
memory in use is that of all processes, their CUDA contexts included.
"""

import contextlib
import os
import statistics
import threading
import time
from typing import Any

PERIOD_S = 0.05


class GpuWatch:
    """Samples the visible GPUs from `__enter__` to `__exit__`; without NVML or a GPU there are no samples."""

    def __init__(self, period_s: float = PERIOD_S):
        self._period_s, self._done = period_s, threading.Event()
        self._samples: list[tuple[float, float, float]] = []
        """(time.time(), share of the period in which a GPU worked, bytes in use on the fullest one)."""
        self._thread: threading.Thread | None = None
        self.trouble = ""
        """Why there are no samples."""

    def __enter__(self) -> "GpuWatch":
        try:
            import pynvml
        except ImportError:
            self.trouble = "pip install nvidia-ml-py"
            return self
        try:
            pynvml.nvmlInit()
            handles = _visible(pynvml)
        except pynvml.NVMLError as error:  # no driver, most often
            self.trouble = f"NVML: {error}"
            return self
        self._thread = threading.Thread(target=self._sample, args=(pynvml, handles), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()

    def idle_share(self, start: float, end: float) -> float | None:
        """Share of the time from `start` to `end` (time.time()) without a kernel, mean over the GPUs."""
        busy = [busy for at, busy, _ in self._samples if start < at <= end]
        return 1 - statistics.fmean(busy) if busy else None

    def peak_bytes(self) -> float | None:
        """The most that was in use on one GPU, of all processes."""
        return max((used for _, _, used in self._samples), default=None)

    def wait_until_free(self, limit_bytes: float, timeout_s: float) -> None:
        """Waits for processes that are ending to give their memory back."""
        deadline = time.time() + timeout_s
        while self._samples and self._samples[-1][2] > limit_bytes and time.time() < deadline:
            time.sleep(self._period_s)

    def _sample(self, pynvml: Any, handles: list[Any]) -> None:
        while not self._done.wait(self._period_s):
            with contextlib.suppress(pynvml.NVMLError):
                busy = statistics.fmean(pynvml.nvmlDeviceGetUtilizationRates(h).gpu / 100 for h in handles)
                used = max(pynvml.nvmlDeviceGetMemoryInfo(h).used for h in handles)
                self._samples.append((time.time(), busy, used))


def _visible(pynvml: Any) -> list[Any]:
    """NVML knows nothing of CUDA_VISIBLE_DEVICES."""
    names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if not names:
        return [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
    by_index, by_uuid = pynvml.nvmlDeviceGetHandleByIndex, pynvml.nvmlDeviceGetHandleByUUID
    return [by_index(int(name)) if name.isdigit() else by_uuid(name) for name in names]
