"""The process that runs reward functions: `python -m grpo_jax.rewards.worker FD MODULE FUNCTION`.

`pool.py` starts it and talks to it over the socket FD. It loads MODULE (a dotted name, or the path of a .py
file) and says ("ok", None); then each ("name of a function", its keyword arguments) that comes in is answered
by ("ok", value), a float from FUNCTION and a string from any other, or by ("error", what happened).

Standard library only: a worker should be there in a tenth of a second, and never touch an accelerator.
"""

import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

from grpo_jax.config import nearest

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
        except BaseException as error:  # sys.exit() included: only the function's own, not the run's
            connection.send(("error", f"raised {describe(error, module_name)}"))
            continue
        try:
            connection.send(("ok", as_score(value) if name == function_name else str(value)))
        except Exception as error:
            connection.send(("error", f"returned {error}"))


def load_module(name: str) -> ModuleType:
    """Imports a module by its dotted name or by the path of its file."""
    if not name.endswith(".py"):
        return importlib.import_module(name)
    path = Path(name)
    sys.path.append(str(path.parent))  # last: what lies beside the file can be imported, but hides nothing
    spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # a path that ends in .py has both
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look a class's module up there
    spec.loader.exec_module(module)
    return module


def check_function(module: ModuleType, name: str) -> None:
    """Raises AttributeError or TypeError if `module` has no function `name`."""
    if not hasattr(module, name):
        raise AttributeError(f"there is no {name!r} in it{nearest(name, vars(module))}")
    if not callable(getattr(module, name)):
        raise TypeError(f"{name!r} is not a function")


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


def describe(error: BaseException, module_name: str) -> str:
    """Returns type, message and the last line of the user's file that took part, on one line."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == module_name]
    place = f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
