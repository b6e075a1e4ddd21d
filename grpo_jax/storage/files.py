"""Files and folders that are there whole or not at all, after a kill or a power cut too.

What is written has a temporary name that nobody else has, reaches the disk, and is then renamed.
"""

import errno
import os
import shutil
import uuid
from pathlib import Path

END = ".tmp"
"""Of every temporary name; those of dead runs are swept by it."""
ORBAX_END = ".orbax-checkpoint-tmp"
"""The same of checkpoints that Orbax is writing, and older versions wrote."""


def temporary_beside(path: Path) -> Path:
    """A name in the folder of `path` that no other process has."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:12]}{END}")


def write_whole(path: Path, content: str) -> None:
    """Writes a text file that is there whole or as it was.

    Raises: OSError: it cannot be written; nothing has changed.
    """
    temporary = temporary_beside(path)
    try:
        with temporary.open("w") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def sync(path: Path) -> None:
    """Returns when a file, or the names in a folder, have reached the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # folders of some network file systems
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Returns when a folder and all below it have reached the disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def replace_folder(temporary: Path, target: Path) -> None:
    """Gives a finished folder its name. A folder that has the name already is gone only after that."""
    sync_tree(temporary)
    old = temporary_beside(target)
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Removes what has a temporary name: of runs that died. Nobody else may be writing there."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if END not in path.suffixes and not path.suffix.startswith(ORBAX_END):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def size_text(num_bytes: float) -> str:
    """A number of bytes for people, as "1.5 GB"; below 0.1 GB in MB, so that what is small is not 0.0."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"
