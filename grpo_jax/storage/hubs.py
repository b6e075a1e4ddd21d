"""Hubs of models: what one has of a model, and the same files in a folder, compared with the hub's own checksums.

The client of each hub does the fetching, and goes on where it was cut short. Both are imported when they are used.
"""

import contextlib
import dataclasses
import fnmatch
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Protocol

from grpo_jax.config import ConfigError

WANTED = (
    "*.safetensors",
    "*.json",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "*.md",
    "LICENSE*",
    "NOTICE*",
)
"""What a run reads, and what belongs to it."""
CLIENT = "modelscope-hub>=0.5.1"
BLOCK = 1 << 20
NAME = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
REFUSALS = (
    *(
        "RepositoryNotFoundError",
        "RevisionNotFoundError",
    ),  # of Hugging Face; a gated model is the first one too
    *("NotExistError", "AuthenticationError", "PermissionDeniedError"),  # of ModelScope
)
"""What the clients raise where the hub answers, and gives nothing of that name: asking again does not help."""


@dataclasses.dataclass(frozen=True)
class HubFile:
    """A file as the hub has it."""

    path: str
    size: int
    digest: str
    """In hexadecimal: sha256, of 64 digits, or git's hash of a blob, of 40; "": the hub does not say."""

    def is_at(self, path: Path) -> bool:
        """Whether that file has the same bytes; True too where it has as many and the hub has no checksum."""
        if path.stat().st_size != self.size:
            return False
        return not self.digest or self.digest == _digest(path, is_git=len(self.digest) == 40)


@dataclasses.dataclass(frozen=True)
class Listing:
    """What a hub has of a model, as far as it is wanted."""

    revision: str
    files: tuple[HubFile, ...]


class Hub(Protocol):
    """One place where models are."""

    branch: str
    """Of the newest files."""

    def listing(self, name: str, revision: str) -> Listing:
        """Asks the hub. Raises: any Exception of its client: it does not give it."""

    def download(self, name: str, listing: Listing, folder: Path) -> None:
        """Fetches what is not in the folder yet. Raises: as `listing`."""


class HuggingFace:
    """See `Hub`. HF_ENDPOINT names a mirror, HF_TOKEN opens gated models."""

    branch = "main"

    def listing(self, name: str, revision: str) -> Listing:
        from huggingface_hub import HfApi
        from huggingface_hub.hf_api import RepoFile

        api = HfApi()
        commit = str(api.model_info(name, revision=revision).sha)
        entries = api.list_repo_tree(name, recursive=True, revision=commit)
        files = [file for file in entries if isinstance(file, RepoFile)]
        listed = (HubFile(f.path, f.size, f.lfs.sha256 if f.lfs is not None else f.blob_id) for f in files)
        return Listing(commit, _wanted(listed))

    def download(self, name: str, listing: Listing, folder: Path) -> None:
        from huggingface_hub import snapshot_download

        snapshot_download(name, revision=listing.revision, local_dir=folder, allow_patterns=list(WANTED))


class ModelScope:
    """See `Hub`. MODELSCOPE_ENDPOINT names another site, MODELSCOPE_API_TOKEN opens private models."""

    branch = "master"

    def __init__(self) -> None:
        """Raises: ConfigError: its client is not installed."""
        try:
            import modelscope_hub
        except ImportError:
            rule = f"the package modelscope-hub is not installed: pip install '{CLIENT}'"
            raise ConfigError("--from", "modelscope", rule) from None
        # It tells of each attempt; what the last one has raised is said in the one line.
        logging.getLogger("modelscope_hub").setLevel(logging.ERROR)
        self._api = modelscope_hub.HubApi()

    def listing(self, name: str, revision: str) -> Listing:
        files = self._api.list_repo_files(name, "model", revision=revision)
        listed = (HubFile(f.path, f.size, f.sha256 or "") for f in files if f.type != "tree")
        return Listing(revision, _wanted(listed))

    def download(self, name: str, listing: Listing, folder: Path) -> None:
        entries = [{"Path": f.path, "Size": f.size, "Sha256": f.digest or None} for f in listing.files]
        self._api.download_repo(name, "model", revision=listing.revision, local_dir=folder, file_list=entries)


HUBS: dict[str, Callable[[], Hub]] = {"hf": HuggingFace, "modelscope": ModelScope}


def check_name(name: str) -> None:
    """Raises: ConfigError: no hub can have a model of that name."""
    if not NAME.fullmatch(name):
        is_here = os.path.exists(os.path.expanduser(name))
        here = f"; what is here already needs no fetching: --config.model.path={name}" if is_here else ""
        raise ConfigError("NAME", name, f"must be OWNER/NAME, as the hub has it{here}")


def fetch(hub: Hub, name: str, folder: Path, revision: str) -> str:
    """Downloads what is not there yet, and compares all of it with the hub's checksums.

    Returns: the revision that the files are of; of the Hugging Face hub, a commit.
    Raises:  ConfigError: the hub does not give it, a file is not what the hub says, or another model is there.
    """
    with _one_line(name, folder):
        listing = hub.listing(name, revision)
    _check_paths(name, listing)
    _refuse_another(name, listing, folder)
    with _one_line(name, folder):
        hub.download(name, listing, folder)
    compare(listing, folder)
    return listing.revision


def check(hub: Hub, name: str, folder: Path, revision: str) -> str:
    """As `fetch`, of a folder that is there, and fetches nothing."""
    with _one_line(name, folder):
        listing = hub.listing(name, revision)
    _check_paths(name, listing)
    compare(listing, folder)
    return listing.revision


def compare(listing: Listing, folder: Path) -> None:
    """Raises: ConfigError: a file is damaged or missing."""
    missing = [file.path for file in listing.files if not (folder / file.path).is_file()]
    damaged = [f.path for f in listing.files if f.path not in missing and not f.is_at(folder / f.path)]
    if damaged:
        rule = f"{', '.join(damaged)}: not what the hub has; delete it, and fetch again"
        raise ConfigError("--to", str(folder), rule)
    if missing:
        raise ConfigError("--to", str(folder), f"lacks {', '.join(missing)}; fetch again")


def _wanted(files: Iterator[HubFile]) -> tuple[HubFile, ...]:
    return tuple(file for file in files if any(fnmatch.fnmatch(file.path, pattern) for pattern in WANTED))


def _check_paths(name: str, listing: Listing) -> None:
    """Raises: ConfigError: the hub has no file of a model there, or names one outside of the folder."""
    if not listing.files:
        raise ConfigError("NAME", name, "the hub has no file of a model there")
    for file in listing.files:
        path = PurePosixPath(file.path)
        if path.is_absolute() or ".." in path.parts:
            raise ConfigError("NAME", name, f"the hub names a file outside of the folder, {file.path!r}")


def _refuse_another(name: str, listing: Listing, folder: Path) -> None:
    """Raises: ConfigError: the folder has a model, and not this one, which would be written over."""
    for file in listing.files:
        path = folder / file.path
        if file.path == "config.json" and path.is_file() and not file.is_at(path):
            rule = f"holds another model: its config.json is not that of {name}; choose another folder"
            raise ConfigError("--to", str(folder), rule)


@contextlib.contextmanager
def _one_line(name: str, folder: Path) -> Iterator[None]:
    """Makes a `ConfigError` of what the hub's client raises: no network, a proxy, a wrong name, no token."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.filename:  # a full disk, a folder that may not be written to
            raise
        # ModelScope's client names each file that failed, and why.
        reasons = [f"{path}: {why}" for path, why in getattr(error, "failed_files", {}).items()]
        lines = [line.strip() for line in (reasons or [str(error)])[0].splitlines() if line.strip()]
        reason = " ".join(lines[:2]) or type(error).__name__
        way = "run the same command again to go on"
        if os.path.isdir(name) and Path(name).resolve() != folder.resolve():
            way = "the folder of that name which is here needs no fetching"
        elif any(kind.__name__ in REFUSALS for kind in type(error).__mro__):
            way = "check the name and the revision, and whether it wants a token"
        rule = f"the hub did not give it ({reason}); {way}"
        raise ConfigError("NAME", name, rule) from None


def _digest(path: Path, *, is_git: bool) -> str:
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size) if is_git else hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
