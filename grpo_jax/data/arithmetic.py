"""Arithmetic word problems, generated from a seed, in the same Parquet schema as GSM8K.

    python -m grpo_jax.data.arithmetic --local_dir=data/arithmetic --num_train=4096 --difficulty=2

A problem is a short story of `difficulty` changes to a number of things. Its answer in `extra_info` is
either worked out, "7+5=12, 12-3=9 #### 9", or direct, "#### 9": a small model gets the
first kind right far more often, and reinforcement learning has to find that out.
"""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpo_jax.config import ConfigError
from grpo_jax.config.command_line import make_parser, one_line_errors
from grpo_jax.data.schema import write_tables

DATA_SOURCE = "grpo_jax/arithmetic"
MAX_DIFFICULTY = 4
LARGEST = 20
"""No number of a story exceeds it."""

NAMES = ("Ana", "Ben", "Eva", "Ian", "Lea", "Max", "Mia", "Tom")
THINGS = ("apples", "books", "cards", "coins", "eggs", "pens", "shells", "stamps")
MORE = ("buys {} more", "finds {} more", "gets {} as a gift", "wins {} more")
FEWER = ("gives {} away", "loses {}", "sells {}", "breaks {}")


def make_problem(rng: random.Random, difficulty: int) -> tuple[str, list[str], int]:
    """Returns a question, its solution as one equation a step, and the answer.

    Args: difficulty: steps, from 1 to 4. Doubling occurs from 3 on.
    """
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    total = rng.randint(2, 9)
    sentences, steps = [f"{name} has {total} {things}."], []
    for _ in range(difficulty):
        kinds = ["more"] * (total + 2 <= LARGEST) + ["fewer"] * (total > 2)
        kinds += ["double"] * (difficulty >= 3 and 2 * total <= LARGEST)
        kind = rng.choice(kinds)
        if kind == "double":
            sentence, sign, change, after = "doubles them", "*", 2, 2 * total
        elif kind == "more":
            change = rng.randint(2, min(9, LARGEST - total))
            sentence, sign, after = rng.choice(MORE).format(change), "+", total + change
        else:
            change = rng.randint(2, min(9, total))
            sentence, sign, after = rng.choice(FEWER).format(change), "-", total - change
        sentences.append(f"{name} {sentence}.")
        steps.append(f"{total}{sign}{change}={after}")
        total = after
    return " ".join([*sentences, f"How many {things} does {name} have now?"]), steps, total


def generate_splits(
    *, num_train: int, num_val: int, num_sft: int, difficulty: int, direct_share: float, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """Rows of the splits "train", "val" and "sft", no question twice.

    Args:
        difficulty: steps of a problem, from 1 to 4.
        direct_share: share of the answers in "sft" that are direct; all others are worked out.

    Raises:
        ConfigError: there are not so many different problems of that difficulty.
    """
    rng = random.Random(seed)
    problems = _distinct_problems(rng, difficulty)
    splits: dict[str, list[dict[str, Any]]] = {}
    for split, count in (("val", num_val), ("train", num_train), ("sft", num_sft)):
        rows = []
        for index in range(count):
            question, steps, answer = next(problems)
            is_direct = split == "sft" and rng.random() < direct_share
            solution = "" if is_direct else ", ".join(steps) + " "
            rows.append(_row(split, index, question, f"{solution}#### {answer}", answer))
        splits[split] = rows
    return splits


def write_splits(folder: Path, splits: dict[str, list[dict[str, Any]]]) -> dict[str, Path]:
    """Writes FOLDER/SPLIT.parquet for every split that has rows. Returns the paths by split."""
    paths = split_paths(folder, splits)
    write_tables({path: splits[split] for split, path in paths.items()})
    return paths


def split_paths(folder: Path, splits: dict[str, list[dict[str, Any]]]) -> dict[str, Path]:
    """The paths of `write_splits`, by split."""
    return {split: folder / f"{split}.parquet" for split, rows in splits.items() if rows}


def _distinct_problems(rng: random.Random, difficulty: int) -> Iterator[tuple[str, list[str], int]]:
    seen: set[str] = set()
    failures = 0
    while failures < 10_000:
        problem = make_problem(rng, difficulty)
        if problem[0] in seen:
            failures += 1
            continue
        failures = 0
        seen.add(problem[0])
        yield problem
    rule = f"there are only about {len(seen)} different problems of this difficulty; ask for fewer"
    raise ConfigError("arithmetic.difficulty", difficulty, rule)


def _row(split: str, index: int, question: str, answer: str, result: int) -> dict[str, Any]:
    return {
        "data_source": DATA_SOURCE,
        "prompt": [{"role": "user", "content": question}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(result)},
        "extra_info": {"split": split, "index": index, "answer": answer, "question": question},
    }


@one_line_errors()
def main() -> None:
    parser = make_parser("grpo_jax.data.arithmetic", __doc__)
    parser.add_argument("--local_dir", required=True, help="folder for train.parquet and val.parquet")
    parser.add_argument("--num_train", type=int, default=4096)
    parser.add_argument("--num_val", type=int, default=256)
    parser.add_argument("--num_sft", type=int, default=0, help="worked examples for supervised training")
    parser.add_argument("--difficulty", type=int, default=2, choices=range(1, MAX_DIFFICULTY + 1))
    parser.add_argument("--direct_share", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    args = vars(parser.parse_args())
    for name in ("num_train", "num_val"):
        if args[name] < 1:
            raise ConfigError(f"--{name}", args[name], "must be at least 1")
    if args["num_sft"] < 0:
        raise ConfigError("--num_sft", args["num_sft"], "must be at least 0")
    if not 0 <= args["direct_share"] <= 1:
        raise ConfigError("--direct_share", args["direct_share"], "must be from 0 to 1")
    folder = Path(args.pop("local_dir"))
    splits = generate_splits(**args)
    try:
        paths = write_splits(folder, splits)
    except OSError as error:
        raise ConfigError("--local_dir", str(folder), f"cannot be written to: {error}") from None
    for split, path in paths.items():
        print(f"{split}: {path}")


if __name__ == "__main__":
    main()
