"""Your own JSON lines as `train.parquet` and `val.parquet` in verl's schema.

    python -m grpo_jax.data.jsonl --source=mine.jsonl --local_dir=data/mine [--prompt=FIELD] [--answer=FIELD]
        [--system=TEXT] [--data_source=NAME] [--solution=FIELD] [--extra FIELD ...]
        [--num_val=N | --val_source=FILE.jsonl] [--seed=0]

A line is an object. Its prompt is a string, which becomes a user's message, or a list of {role, content}; its
answer, a string or a number, is the ground truth that the reward function gets. All lines are read and checked
before anything is written; bad ones are named by their numbers.

Validation takes N lines, drawn with the seed from those whose prompt occurs once, or those of another file.
"""

import argparse
import collections
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_jax.config import ConfigError
from grpo_jax.config.command_line import make_parser, one_line_errors
from grpo_jax.data.schema import check_row, write_tables

MOST_NAMED = 10
"""Bad lines whose numbers a message gives."""


@one_line_errors()
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    args = _parse(argv)
    source = Path(args.source)
    rows = {"train": read_rows(source, "--source", args)}
    if args.val_source:
        rows["val"] = read_rows(Path(args.val_source), "--val_source", args)
        prompts = {_text_of(row) for row in rows["val"]}
        if both := sum(_text_of(row) in prompts for row in rows["train"]):
            print(f"WARNING: {both} prompts of {args.source} are in {args.val_source} too")
    else:
        rows["train"], rows["val"] = split(rows["train"], args.num_val, args.seed)
    for name, of_split in rows.items():
        for index, row in enumerate(of_split):
            row["extra_info"] = {"split": name, "index": index} | row["extra_info"]
    paths = {name: Path(args.local_dir) / f"{name}.parquet" for name in rows if rows[name]}
    _write(paths, rows, args)
    for name, path in paths.items():
        print(f"{path}: {len(rows[name])} rows")


def read_rows(file: Path, flag: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Reads the lines of a file into rows of `schema.py`; empty lines are none.

    Raises: ConfigError: no such file, no line in it, or bad lines: the reason of the first, the numbers of all.
    """
    if not file.is_file():
        raise ConfigError(flag, str(file), "is a folder" if file.is_dir() else "there is no such file")
    rows, bad = [], {}
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            rows.append(to_row(_read_line(line), args, args.data_source or Path(args.source).stem))
        except ValueError as error:
            bad[number] = str(error)
    if bad:
        first, *others = bad
        more = ", ".join(map(str, others[:MOST_NAMED])) + (", ..." if len(others) > MOST_NAMED else "")
        rule = bad[first] + (f" (bad too: line {more})" if others else "")
        raise ConfigError(flag, f"{file} line {first}", rule)
    if not rows:
        raise ConfigError(flag, str(file), "has no lines")
    return rows


def to_row(example: Mapping[str, Any], args: argparse.Namespace, data_source: str) -> dict[str, Any]:
    """Turns one object into a row. Raises: ValueError: a field is missing, or not what it must be."""
    for field in (args.prompt, args.answer, *([args.solution] if args.solution else []), *args.extra):
        if field not in example:
            raise ValueError(f"has no field {field!r} (it has {', '.join(example) or 'none'})")
    prompt = example[args.prompt]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    extra_info = {field: example[field] for field in args.extra}
    if args.solution:
        extra_info["answer"] = example[args.solution]
        if not isinstance(extra_info["answer"], str) or not extra_info["answer"].strip():
            raise ValueError(f"{args.solution} must be a string that is not empty")
    row = check_row(
        {
            "data_source": data_source,
            "prompt": messages,
            "reward_model": {"style": "rule", "ground_truth": example[args.answer]},
            "extra_info": extra_info,
        }
    )
    if args.system:
        if row["prompt"][0]["role"] == "system":
            raise ValueError("has a system message already, and --system gives another")
        row["prompt"] = [{"role": "system", "content": args.system}, *row["prompt"]]
    return row | {"ability": ""}


def split(
    rows: Sequence[dict[str, Any]], num_val: int, seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Draws `num_val` rows for validation, whose prompts are in no other row. Both parts keep their order.

    Raises: ConfigError: so many would leave none to train on, or have prompts of their own.
    """
    count = collections.Counter(map(_text_of, rows))
    single = [number for number, row in enumerate(rows) if count[_text_of(row)] == 1]
    if num_val >= len(rows) or num_val > len(single):
        rule = (
            f"must be less than the {len(rows)} lines, and at most the {len(single)} whose prompt occurs once"
        )
        raise ConfigError("--num_val", num_val, rule)
    drawn = set(random.Random(seed).sample(single, num_val))
    parts: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for number, row in enumerate(rows):
        parts[number in drawn].append(row)
    return parts


def _text_of(row: Mapping[str, Any]) -> str:
    return json.dumps(row["prompt"], sort_keys=True)


def _read_line(line: bytes) -> dict[str, Any]:
    """Raises: ValueError: no JSON, no object, or text that is no Unicode."""
    try:
        example = json.loads(line)
        json.dumps(example, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("holds half of a character (a lone surrogate)") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {error}") from None
    if not isinstance(example, dict):
        raise ValueError(f"must be an object, is {example!r:.100}")
    return example


def _write(paths: Mapping[str, Path], rows: Mapping[str, Any], args: argparse.Namespace) -> None:
    import pyarrow as pa

    try:
        write_tables({path: rows[name] for name, path in paths.items()})
    except (pa.ArrowException, OverflowError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError("--extra", args.extra, f"a field has no one type in all lines: {reason}") from None
    except OSError as error:
        raise ConfigError("--local_dir", args.local_dir, f"cannot be written to: {error}") from None


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Raises: ConfigError: flags that do not go together."""
    parser = make_parser("grpo_jax.data.jsonl", __doc__)
    parser.add_argument("--source", required=True, help="a file of JSON lines")
    parser.add_argument("--local_dir", required=True, help="folder for train.parquet and val.parquet")
    parser.add_argument("--prompt", default="prompt", help="field with the prompt (default: prompt)")
    parser.add_argument("--answer", default="answer", help="field with the ground truth (default: answer)")
    parser.add_argument("--system", default="", help="text of a system message before each prompt")
    parser.add_argument("--data_source", default="", help="name that rewards get (default: SOURCE's stem)")
    parser.add_argument("--solution", default="", help="field with the text that a warm start imitates")
    parser.add_argument("--extra", default=[], nargs="+", metavar="FIELD", help="fields for extra_info")
    parser.add_argument("--num_val", type=int, default=0, help="lines for validation")
    parser.add_argument("--val_source", default="", help="a file of JSON lines for validation")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    args = parser.parse_args(argv)
    if args.num_val < 0:
        raise ConfigError("--num_val", args.num_val, "must be at least 0")
    if bool(args.num_val) == bool(args.val_source):
        rule = "a run needs validation: give one of --num_val and --val_source"
        raise ConfigError("--num_val", args.num_val, rule)
    for field in args.extra:
        if field in ("split", "index") or (field == "answer" and args.solution):
            raise ConfigError("--extra", field, "is a field that extra_info has already")
    return args


if __name__ == "__main__":
    main()
