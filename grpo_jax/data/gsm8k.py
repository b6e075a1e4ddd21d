"""GSM8K as prompt datasets: `train.parquet` (7,473 rows) and `test.parquet` (1,319) in verl's schema.

    python -m grpo_jax.data.gsm8k --local_dir=data/gsm8k [--source=HUB_NAME_OR_FOLDER] [--max_calculations=N]

Small models find most of it too hard: `--max_calculations=2` keeps the problems whose solution takes one or two
calculations (2,579 and 422 rows). The solutions mark each, as in "48/2 = <<48/2=24>>24".

A folder may hold the original `train.jsonl` and `test.jsonl`, or Parquet files as the hub has them
(`main/train-00000-of-00001.parquet`). Both splits are read and checked before anything is written.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from grpo_jax.config import ConfigError
from grpo_jax.config.command_line import make_parser, one_line_errors
from grpo_jax.data.schema import write_tables

HUB_NAME = "openai/gsm8k"
INSTRUCTION = 'Let\'s think step by step and output the final answer after "####".'  # verl's, word for word
SPLITS = ("train", "test")


@one_line_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = make_parser("grpo_jax.data.gsm8k", __doc__)
    parser.add_argument("--local_dir", required=True, help="folder for train.parquet and test.parquet")
    parser.add_argument("--source", default=HUB_NAME, help=f"hub name or folder (default: {HUB_NAME})")
    parser.add_argument(
        "--max_calculations",
        type=int,
        default=0,
        help="of a problem's solution; harder ones are left out; 0: any",
    )
    args = parser.parse_args(argv)
    if args.max_calculations < 0:
        raise ConfigError("--max_calculations", args.max_calculations, "must be at least 0")

    folder = find_source(args.source)
    read = {split: read_split(folder, split) for split in SPLITS}
    rows = {split: at_most(read[split], args.max_calculations) for split in SPLITS}
    for split in SPLITS:
        if not rows[split]:
            rule = f"leaves no problem of {split}.parquet: no solution there marks so few calculations"
            raise ConfigError("--max_calculations", args.max_calculations, rule)
    paths = {split: Path(args.local_dir) / f"{split}.parquet" for split in SPLITS}
    try:
        write_tables({path: rows[split] for split, path in paths.items()})
    except OSError as error:
        raise ConfigError("--local_dir", args.local_dir, f"cannot be written to: {error}") from None
    for split, path in paths.items():
        left_out = len(read[split]) - len(rows[split])
        print(f"{path}: {len(rows[split])} rows" + (f", {left_out} left out" if left_out else ""))


def find_source(source: str) -> Path:
    """Returns the folder with the original files; downloads the Parquet files of a hub dataset.

    Raises:
        ConfigError: neither a folder nor a dataset that the hub gave us.
    """
    if Path(source).is_dir():
        return Path(source)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source):
        raise ConfigError("--source", source, "there is no such folder, and a hub name looks like OWNER/NAME")
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(source, repo_type="dataset", allow_patterns=["main/*.parquet"])
        )
    except Exception as error:  # no network, a proxy, a wrong name, no disk: the way out is the same
        reason = str(error).strip().partition("\n")[0]
        rule = f"is no folder here and the hub did not give it ({reason}); pass --source=FOLDER"
        raise ConfigError("--source", source, f"{rule} with train.jsonl and test.jsonl") from None


def read_split(folder: Path, split: str) -> list[dict[str, Any]]:
    """Reads one split of the original data into rows of `schema.py`.

    Raises:
        ConfigError: the split is missing, or a line is malformed; names file and line.
    """
    rows: list[dict[str, Any]] = []
    for place, example in _read_examples(folder, split):
        try:
            rows.append(to_row(example, split, len(rows)))
        except ValueError as error:
            raise ConfigError("--source", place, str(error)) from None
    if not rows:
        raise ConfigError("--source", str(folder), f"its {split} split is empty")
    return rows


def to_row(example: Any, split: str, index: int) -> dict[str, Any]:
    """Turns {"question", "answer"} into the row that verl's GSM8K script writes.

    Raises:
        ValueError: a field is missing, or the answer does not end in "#### NUMBER".
    """
    if not isinstance(example, dict):
        raise ValueError("must be an object with question and answer")
    for field in ("question", "answer"):
        if not isinstance(example.get(field), str) or not example[field].strip():
            raise ValueError(f"{field} must be a string that is not empty")
        if any("\ud800" <= character <= "\udfff" for character in example[field]):
            raise ValueError(f"{field} holds half of a character (a lone surrogate)")
    question, answer = example["question"], example["answer"]
    final = re.search(r"#### (-?[0-9.,]+)", answer)
    if final is None:
        raise ValueError('the answer has no "#### NUMBER"')
    return {
        "data_source": HUB_NAME,
        "prompt": [{"role": "user", "content": f"{question} {INSTRUCTION}"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": final[1].replace(",", "")},
        "extra_info": {"split": split, "index": index, "answer": answer, "question": question},
    }


def at_most(rows: list[dict[str, Any]], max_calculations: int) -> list[dict[str, Any]]:
    """The rows whose solution marks 1 to `max_calculations` calculations; 0: all rows.

    A solution that marks none says nothing about how many it takes.
    """
    if not max_calculations:
        return rows
    return [row for row in rows if 1 <= num_calculations(row["extra_info"]["answer"]) <= max_calculations]


def num_calculations(answer: str) -> int:
    """How many calculations, <<48/2=24>>, an original answer marks."""
    return len(re.findall(r"<<[^<>]*>>", answer))


def _read_examples(folder: Path, split: str) -> Iterator[tuple[str, Any]]:
    """Yields ("FILE line N" or "FILE row N", the example as it stands there)."""
    lines = folder / f"{split}.jsonl"
    if lines.is_file():
        yield from _read_jsonl(lines)
        return
    name = f"{split}-*.parquet"
    files = sorted(folder.glob(f"main/{name}")) or sorted(folder.glob(name))
    if not files:
        rule = f"must hold {split}.jsonl, or main/{split}-00000-of-00001.parquet as the hub has it"
        raise ConfigError("--source", str(folder), rule)
    for file in files:
        yield from _read_parquet(file)


def _read_jsonl(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{file} line {number}"
            try:
                yield place, json.loads(line)
            except (ValueError, RecursionError) as error:  # JSON or UTF-8
                raise ConfigError("--source", place, f"is not JSON: {error}") from None


def _read_parquet(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        examples = pq.read_table(file).to_pylist()
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise ConfigError("--source", str(file), f"cannot be read as Parquet: {error}") from None
    for number, example in enumerate(examples):
        yield f"{file} row {number}", example


if __name__ == "__main__":
    main()
