"""The manifest of a folder: size and SHA-256 of each file, by which any damage is found.

It is written last, when every file has reached the disk.
"""

import concurrent.futures
import contextlib
import fnmatch
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from grpo_jax.storage.files import replace_folder, sync_tree, temporary_beside, write_whole

NAME = "manifest.json"
NUM_THREADS = 4
"""That hash at once: SHA-256 runs at 1 to 2 GB/s on one core."""


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Writes the manifest of all files below a folder, which must not change any more.

    Args: facts: JSON that goes along.
    """
    sync_tree(folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / NAME)
    with concurrent.futures.ThreadPoolExecutor(NUM_THREADS) as threads:
        digests = list(threads.map(_digest, files))
    entries = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, digests, strict=True)
    }
    content = {"files": entries, "facts": dict(facts)}
    write_whole(folder / NAME, json.dumps({**content, "sha256": _digest_of(content)}, indent=1) + "\n")


@contextlib.contextmanager
def new_folder(target: Path, facts: Mapping[str, Any]) -> Iterator[Path]:
    """A folder to write files into. It gets the name `target` only when it is complete, with its manifest.

    Args: facts: of the manifest.
    """
    temporary = temporary_beside(target)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        write_manifest(temporary, facts)
        replace_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def has_manifest(folder: Path) -> bool:
    return (folder / NAME).exists()


def read_facts(folder: Path) -> dict[str, Any]:
    """The facts of a folder's manifest.

    Raises: ValueError: there is none, or it is damaged.
    """
    return _read(folder)["facts"]


def size(folder: Path) -> int:
    """Bytes of a folder's files, by its manifest. Raises: ValueError: as `read_facts`."""
    return sum(entry["size"] for entry in _read(folder)["files"].values())


def damage(folder: Path, pattern: str = "*") -> str:
    """What is not as the manifest has it, in a few words; "" for a folder that is whole.

    Args: pattern: of the names of the files that are looked at.
    """
    try:
        entries = {
            name: entry for name, entry in _read(folder)["files"].items() if fnmatch.fnmatch(name, pattern)
        }
    except ValueError as error:
        return str(error)
    for name, entry in entries.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != entry["size"]:
            return f"{name} has {path.stat().st_size} bytes instead of {entry['size']}"
    with concurrent.futures.ThreadPoolExecutor(NUM_THREADS) as threads:
        digests = threads.map(lambda name: _read_digest(folder / name), entries)
        for (name, entry), digest in zip(entries.items(), digests, strict=True):
            if digest != entry["sha256"]:
                return f"{name} {digest if digest.startswith('cannot') else 'holds other bytes than were written'}"
    return ""


def _read(folder: Path) -> dict[str, Any]:
    try:
        content = json.loads((folder / NAME).read_text())
        digest = content.pop("sha256")
        is_whole = digest == _digest_of(content)
    except FileNotFoundError:
        raise ValueError(f"{NAME} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{NAME} cannot be read ({type(error).__name__})") from None
    if not is_whole:
        raise ValueError(f"{NAME} holds other bytes than were written")
    return content


def _digest_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_digest(path: Path) -> str:
    """The digest, or "cannot be read (...)"."""
    try:
        return _digest(path)
    except OSError as error:  # a bad sector
        return f"cannot be read ({error})"
