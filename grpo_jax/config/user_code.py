"""Functions of the user's own, named FILE.py:NAME: advantage estimators, policy losses, KL estimators, rewards.

Standard library only: the processes that run reward functions import this too, and should start in a moment.
"""

import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from grpo_jax.config.rules import ConfigError, nearest


def load_function(key: str, value: str) -> Any:
    """Returns NAME of "FILE.py:NAME", in this process.

    Args:   key: of the configuration, for messages.
    Raises: ConfigError: there is no such file, it cannot be imported, or it lacks the function.
    """
    path, _, name = value.rpartition(":")
    if not Path(path).is_file():
        raise ConfigError(key, value, f"there is no file {path}")
    file = str(Path(path).resolve())
    try:
        module = load_module(file)
        check_function(module, name)
    except (Exception, SystemExit) as error:  # the file is the user's, and so is whatever it raises
        raise ConfigError(key, value, f"cannot be loaded: {describe(error, file)}") from None
    return getattr(module, name)


def load_module(name: str) -> ModuleType:
    """Imports a module by its dotted name or by the path of its file. A file runs once, in however many keys."""
    if not name.endswith(".py"):
        return importlib.import_module(name)
    path = Path(name)
    loaded = sys.modules.get(f"user_{path.stem}")
    if loaded is not None and loaded.__file__ == name:
        return loaded
    sys.path.append(str(path.parent))  # last: what lies beside the file can be imported, but hides nothing
    spec = importlib.util.spec_from_file_location(f"user_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # a path that ends in .py has both
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look a class's module up there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module


def check_function(module: ModuleType, name: str) -> None:
    """Raises AttributeError or TypeError if `module` has no function `name`."""
    if not hasattr(module, name):
        raise AttributeError(f"there is no {name!r} in it{nearest(name, vars(module))}")
    if not callable(getattr(module, name)):
        raise TypeError(f"{name!r} is not a function")


def describe(error: BaseException, module_name: str) -> str:
    """Returns type, message and the last line of the user's file that took part, on one line."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == module_name]
    place = f" ({Path(own[-1].filename).name}:{own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"
