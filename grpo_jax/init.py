"""Copies the recipes, examples and launch scripts that came with the package into a folder of yours.

    python -m grpo_jax.init FOLDER

FOLDER then holds `configs/`, `examples/` and `launch/`, and every command of the docs works from there,
without a clone of the repository. Files that are there already and are the same are left alone; if one differs,
nothing is written.
"""

import filecmp
import shutil
from pathlib import Path

from grpo_jax.config import ConfigError
from grpo_jax.config.command_line import make_parser, one_line_errors

FOLDERS = ("configs", "examples", "launch")
EXTENSIONS = (".py", ".sh", ".yaml", ".md", ".jsonl")


def shipped() -> Path:
    """The folder that holds `FOLDERS`: inside an installed package, or the clone of an editable one.

    Raises: ConfigError: neither has them.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "_shipped", package.parent):
        if all((folder / name).is_dir() for name in FOLDERS):
            return folder
    rule = f"was installed without {' and '.join(FOLDERS)}; install a wheel, or a clone with pip install -e ."
    raise ConfigError("installation", str(package), rule)


def copies(source: Path, target: Path) -> dict[Path, Path]:
    """The files to copy: from -> to."""
    found = [path for name in FOLDERS for path in sorted((source / name).rglob("*"))]
    files = [path for path in found if path.is_file() and path.suffix in EXTENSIONS]
    return {path: target / path.relative_to(source) for path in files}


def copy_all(files: dict[Path, Path]) -> int:
    """Copies what is not there yet, modes included. Returns how many files that were.

    Raises: ConfigError: a file is there and differs; nothing is written then.
    """
    present = [(source, path) for source, path in files.items() if path.exists()]
    for source, path in present:
        if not path.is_file() or not filecmp.cmp(source, path, shallow=False):
            raise ConfigError("FOLDER", str(path), "is there already and differs; name another folder")
    missing = {source: path for source, path in files.items() if not path.exists()}
    for source, path in missing.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, path)
        if path.suffix == ".sh":
            path.chmod(0o755)  # as in the repository; not every installer keeps modes
    return len(missing)


@one_line_errors()
def main() -> None:
    parser = make_parser("grpo_jax.init", __doc__)
    parser.add_argument("folder", metavar="FOLDER", help="made if it is not there")
    folder = Path(parser.parse_args().folder)
    if folder.exists() and not folder.is_dir():
        raise ConfigError("FOLDER", str(folder), "is a file")
    source = shipped()
    num_copied = copy_all(copies(source, folder))
    print(f"{folder}: {num_copied} files copied ({', '.join(f'{name}/' for name in FOLDERS)})")
    print(f"Next: cd {folder} && python -m grpo_jax.train --config=configs/quickstart.py")


if __name__ == "__main__":
    main()
