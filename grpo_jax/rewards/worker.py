"""The process that runs reward functions: `python -m grpo_jax.rewards.worker FD MODULE FUNCTION`.

`pool.py` starts it and talks to it over the socket FD. It loads MODULE (a dotted name, or the path of a .py
file) and says ("ok", None); then each ("name of a function", its keyword arguments) that comes in is answered
by ("ok", value), a float from FUNCTION and a string from any other, by ("error", what happened), or by
("unreadable", why) after an `UnreadableError`.

Standard library only: a worker should be there in a tenth of a second, and never touch an accelerator.
"""

import os
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

from grpo_jax.config.user_code import check_function, describe, load_module
from grpo_jax.rewards import UnreadableError

FLOAT32_MAX = 3.4028234e38


def main(fd: int, module_name: str, function_name: str) -> None:
    """Answers requests until the other end is closed."""
    connection = Connection(fd)
    # What a function prints is for the user, at once, and must not get between the lines of our output.
    os.dup2(2, 1)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    try:
        module = load_module(module_name)
        check_function(module, function_name)
    except BaseException as error:
        connection.send(("error", describe(error, module_name)))
        return
    connection.send(("ok", None))
    while True:
        try:
            name, kwargs = connection.recv()
        except EOFError:
            return
        try:
            value = getattr(module, name)(**kwargs)
        except UnreadableError as error:
            connection.send(("unreadable", str(error)))
            continue
        except BaseException as error:  # sys.exit() included: only the function's own, not the run's
            connection.send(("error", f"raised {describe(error, module_name)}"))
            continue
        try:
            connection.send(("ok", as_score(value) if name == function_name else str(value)))
        except Exception as error:
            connection.send(("error", f"returned {error}"))


def as_score(value: Any) -> float:
    """Returns a reward function's result as a float that float32 can hold.

    Raises:
        ValueError: it is none; the message says what it is instead.
    """
    if isinstance(value, Mapping):
        if "score" not in value:
            raise ValueError(
                f"a dictionary without 'score' (it has {', '.join(map(str, value)) or 'nothing'})"
            )
        value = value["score"]
    if isinstance(value, str) or not hasattr(type(value), "__float__"):
        raise ValueError(f"{type(value).__name__}, which is not a number")
    try:
        score = float(value)
    except Exception as error:  # an array of several elements, say
        raise ValueError(f"{type(value).__name__}, which is not a number ({error})") from None
    if not abs(score) <= FLOAT32_MAX:
        raise ValueError(f"{score}, which is not a finite float32")
    return score


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
