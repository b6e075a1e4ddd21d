"""Which GPUs the runs of this user on this host use, so that one is told of another that has the same ones.

A run has a locked file for each of its GPUs, named by the GPU's UUID, which is the same in every process. The
kernel frees the lock when the run dies, however it dies.
"""

import contextlib
import fcntl
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from jax.sharding import Mesh

from grpo_jax.run.lock import holder, this_process
from grpo_jax.weight_sync import cuda

logger = logging.getLogger(__name__)


def gpus_of(mesh: Mesh) -> list[str]:
    """UUIDs of the NVIDIA GPUs of a mesh; [] of other devices."""
    if mesh.devices.flat[0].platform != "gpu":
        return []
    try:
        return [cuda.device_uuid(device.local_hardware_id) for device in mesh.local_devices]
    except (OSError, cuda.CudaError) as error:  # GPUs of another maker
        logger.debug("the GPUs have no UUIDs: %s", error)
        return []


@contextlib.contextmanager
def hold(uuids: Sequence[str], folder: Path | None = None) -> Iterator[None]:
    """Tells other runs that this one uses GPUs, and warns, in one line, where another one does already.

    Args: folder: of the files; None: the user's own below the host's folder for temporary files.
    """
    if not uuids:
        yield
        return
    folder = folder or Path(tempfile.gettempdir()) / f"grpo_jax-gpus-{os.getuid()}"
    with contextlib.ExitStack() as held:
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                raise PermissionError(f"{folder} belongs to somebody else")
            _warn(_others(uuids, folder))
            for uuid in uuids:
                held.enter_context(_locked(folder / f"{uuid}.{os.getpid()}"))
        except OSError as error:
            logger.warning("WARNING: nobody can tell whether other runs use these GPUs: %s", error)
        yield


def _others(uuids: Sequence[str], folder: Path) -> dict[str, list[int]]:
    """Who uses these GPUs, in words -> which of them, by their places. Files of runs that have died go."""
    found: dict[str, list[int]] = {}
    for i, uuid in enumerate(uuids):
        for path in sorted(folder.glob(f"{uuid}.*")):
            with contextlib.suppress(FileNotFoundError), path.open() as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    path.unlink()
                except BlockingIOError:
                    found.setdefault(holder(path), []).append(i)
    return found


def _warn(others: dict[str, list[int]]) -> None:
    for who, places in others.items():
        names = ", ".join(map(str, places))
        text = "WARNING: GPU %s of this run is used by %s too: both are slow, and may run out of memory; "
        logger.warning(text + "CUDA_VISIBLE_DEVICES chooses others", names, who)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.write(json.dumps(this_process()) + "\n")
        file.flush()
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
