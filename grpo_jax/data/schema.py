"""Prompt datasets on disk: Parquet in verl's schema goes in or out, a list of rows is what the code sees.

    data_source   string
    prompt        list of {role, content}, or a plain string
    ability       string (not read)
    reward_model  {style, ground_truth}; ground_truth is a string or a number
    extra_info    anything, typically {split, index, answer, question}; may be missing

Nothing here knows about tokens: `prompts.py` encodes.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_jax.config import ConfigError
from grpo_jax.storage.files import sync, temporary_beside

REQUIRED_COLUMNS = ("data_source", "prompt", "reward_model")


def write_rows(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes `rows` as one Parquet file that appears complete or not at all; makes its folder.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    write_tables({Path(path): rows})


def write_tables(tables: Mapping[Path, Sequence[Mapping[str, Any]]]) -> None:
    """Writes one Parquet file a path, its rows by path. None gets its name before all of them are complete.

    Raises:
        OSError: a folder cannot be made or written to; what was there is as it was.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    made = {path: pa.Table.from_pylist([dict(row) for row in rows]) for path, rows in tables.items()}
    partial = {path: temporary_beside(path) for path in tables}
    try:
        for path, temporary in partial.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(made[path], temporary)
            sync(temporary)
        for path, temporary in partial.items():
            temporary.replace(path)
    finally:
        for temporary in partial.values():
            temporary.unlink(missing_ok=True)


def read_rows(files: Sequence[str | Path], key: str) -> list[dict[str, Any]]:
    """Reads and checks the rows of `files`, joined in that order.

    Args:
        key: the configuration key that named the files, for messages.

    Returns:
        What `check_rows` makes of each file, with the file's stem in the prompt ids (its whole path where two
        files share a stem).

    Raises:
        ConfigError: a file is missing, is not Parquet, lacks a column or has a row that `check_rows` refuses.
    """
    paths = [Path(file) for file in files]
    stems = [path.stem for path in paths]
    rows = []
    for path in paths:
        name = path.stem if stems.count(path.stem) == 1 else str(path.with_suffix(""))
        rows.extend(check_rows(_read_table(path, key), name=name, source=str(path), key=key))
    return rows


def check_rows(
    rows: Iterable[Mapping[str, Any]], *, name: str, source: str, key: str
) -> list[dict[str, Any]]:
    """Checks rows in verl's schema, wherever they come from, and numbers them.

    Args:
        name: first half of the prompt ids, "NAME/ROW".
        source: what a message calls the rows, such as the file's path.
        key: the configuration key to blame.

    Returns:
        Dictionaries with `prompt_id`, `prompt` (a string or a list of messages), `data_source`,
        `reward_model` (`ground_truth` now always a string) and `extra_info` (a dictionary, perhaps empty).

    Raises:
        ConfigError: no rows, an empty prompt, a null or empty ground truth; names source and row.
    """
    checked = []
    for number, row in enumerate(rows):
        try:
            checked.append(check_row(row) | {"prompt_id": f"{name}/{number}"})
        except ValueError as error:
            raise ConfigError(key, source, f"row {number}: {error}") from None
    if not checked:
        raise ConfigError(key, source, "has no rows")
    return checked


def check_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Raises ValueError, saying what is wrong."""
    data_source = row.get("data_source")
    if not isinstance(data_source, str):
        raise ValueError(f"data_source must be a string, is {data_source!r}")
    reward_model = _fields(row, "reward_model")
    return {
        "prompt": _check_prompt(row.get("prompt")),
        "data_source": data_source,
        "reward_model": reward_model | {"ground_truth": _ground_truth(reward_model.get("ground_truth"))},
        "extra_info": _fields(row, "extra_info"),
    }


def _fields(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A column's fields in one row, of a struct or a map; none where it is null or missing."""
    value = row.get(name)
    try:
        return dict(value or {})
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a struct, is {value!r:.100}") from None


def _check_prompt(prompt: Any) -> str | list[dict[str, Any]]:
    if not prompt or (isinstance(prompt, str) and not prompt.strip()):
        raise ValueError("the prompt is empty")
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list) or not all(isinstance(message, dict) for message in prompt):
        raise ValueError("the prompt must be a string or a list of chat messages")
    for message in prompt:
        for field in ("role", "content"):
            if not isinstance(message.get(field), str):
                raise ValueError(f"a chat message's {field} must be a string, is {message.get(field)!r}")
    if not any(message["content"].strip() for message in prompt):
        raise ValueError("the prompt is empty")
    # Arrow gives every message the union of all fields; chat templates tell "absent" from "null".
    return [{field: value for field, value in message.items() if value is not None} for message in prompt]


def _ground_truth(value: Any) -> str:
    """Returns the answer as the string that reward functions compare with: 18 and 18.0 are "18"."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise ValueError("reward_model.ground_truth is empty")
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"reward_model.ground_truth must be a string or a number, is {value!r}")
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"reward_model.ground_truth must be finite, is {value!r}")
        return str(int(value)) if value.is_integer() else repr(value)
    return str(value)


def _read_table(path: Path, key: str) -> list[dict[str, Any]]:
    """Returns the raw rows of one Parquet file, the needed columns only."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if not path.is_file():
            rule = "there is no such file; `python -m grpo_jax.data.gsm8k` makes GSM8K's"
            raise ConfigError(key, str(path), rule)
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            columns = [name for name in (*REQUIRED_COLUMNS, "extra_info") if name in schema.names]
            table = file.read(columns)
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(key, str(path), f"cannot be read as Parquet: {error}") from None
    for name in REQUIRED_COLUMNS:
        if name not in columns:
            raise ConfigError(key, str(path), f"has no column {name!r} (it has {', '.join(schema.names)})")
    reward_model = schema.field("reward_model").type
    if not pa.types.is_struct(reward_model) or reward_model.get_field_index("ground_truth") < 0:
        raise ConfigError(key, str(path), "its column 'reward_model' has no field 'ground_truth'")
    try:
        return table.to_pylist()
    except (ValueError, OverflowError) as error:  # text that is not UTF-8, dates beyond Python's
        raise ConfigError(key, str(path), f"holds a value that cannot be read: {error}") from None
