"""What every command shares: its flags, its configuration file, and one line on stderr for a user's mistake.

Standard library only until a file is read, so that `--help` and a mistyped flag answer at once. The commands that
take a configuration have the command line

    --config=FILE.py[:VARIANT] [--workdir=DIR] [--config.SECTION.KEY=VALUE ...]

FILE.py has `get_config()`, or `get_config(VARIANT)`, which returns an `ml_collections.ConfigDict`. What it leaves
out has its default.
"""

import argparse
import ast
import atexit
import contextlib
import dataclasses
import errno
import faulthandler
import logging
import os
import re
import runpy
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from grpo_jax.config.old_names import OLD_NAME, ROOT, key_of
from grpo_jax.config.rules import (
    NO_SECTION,
    ConfigError,
    broken_text,
    nearest,
    parse_config,
    unread_keys,
)
from grpo_jax.config.sections import KEYS, Config
from grpo_jax.config.text import printable
from grpo_jax.config.user_code import describe

USAGE = "--config=FILE.py[:VARIANT] [--workdir=DIR] [--config.SECTION.KEY=VALUE ...]"


INTERRUPTED = 130
"""Exit code after Ctrl-C or SIGTERM, as shells have it."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)


OF_INPUT = (
    *(errno.EACCES, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.ENOENT, errno.ENOTDIR, errno.EPERM, errno.EROFS),
)
"""Of a file that was named wrongly or must not be touched: the user's to change."""


START_S, EXIT_S = 7200.0, 600.0
"""What a command may take until it watches its phases itself (`run/hangs.py`), or in all where it does not; and
what Python may take to end it, which waits for threads of libraries."""


def _interrupted(number: int, frame: Any) -> None:
    print("Interrupted before anything was done.", file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)  # an exception would end as some import's traceback


_seen: list[int] = []
"""Signals that were to end a command with one line."""


def _interrupt(number: int, frame: Any) -> None:
    _seen.append(number)
    hush()
    raise KeyboardInterrupt


def was_interrupted() -> bool:
    """Whether Ctrl-C or SIGTERM came. Python drops the exception where it comes within some object's `__del__`."""
    return bool(_seen)


def hush() -> None:
    """After a signal: keeps silent what Python and libraries tell of the exception until a command has ended."""
    if IS_COMMAND:
        logging.getLogger("asyncio").disabled = True
        sys.unraisablehook = lambda _: None
        threading.excepthook = lambda _: None


def _ignore_signals() -> None:
    """For Python's very end, where it takes handlers away, and a signal would kill what has done all."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


# Here, because commands import this first, and then JAX and more for seconds. Who imports it for other reasons
# keeps his handlers.
IS_COMMAND = str(getattr(sys.modules["__main__"].__spec__, "name", "")).startswith("grpo_jax.")
if IS_COMMAND:
    faulthandler.dump_traceback_later(START_S, exit=True)
    for _number in SIGNALS:
        signal.signal(_number, _interrupted)
    atexit.register(_ignore_signals)  # the first, and so the last of all to be called


@contextlib.contextmanager
def one_line_errors(flags: Mapping[str, str] | None = None) -> Iterator[None]:
    """Turns a `ConfigError` into `error: ...` on stderr and exit code 2, Ctrl-C and SIGTERM into one line and 130.

    An `OSError` becomes one line too, with exit code 2 where the user named the file wrongly, and 1 where not.
    Works as a decorator too. For everything that a command does, from its first line on; a signal that comes after
    its last, while Python ends, changes nothing.

    Args: flags: configuration key -> the flag by which this command's user set it.
    """
    own = [number for number in SIGNALS if signal.getsignal(number) is _interrupted]
    for number in own:
        signal.signal(number, _interrupt)
    code = 1  # of any other exception
    try:
        with _in_one_line(flags or {}):
            yield
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        raise
    finally:
        # CPython remembers that Ctrl-C once left a string that was being executed, as those of which dataclasses
        # are made, and with `python -m` ends by that signal in place of the code. Another string makes it forget.
        exec("")
        with contextlib.suppress(Exception):  # a full disk, a closed pipe: Python says so itself in the end
            sys.stdout.flush()
        for number in own:
            signal.signal(number, lambda *_: os._exit(code))


@contextlib.contextmanager
def _in_one_line(flags: Mapping[str, str]) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except ConfigError as error:
        _exit(str(ConfigError(flags.get(error.key, error.key), error.value, _with_flags(error.rule, flags))))
    except OSError as error:  # of files: a disk that is full, a folder that may not be looked into
        named = f"{error.filename}: " if error.filename else ""
        _exit(f"{named}{error.strerror or error}", code=2 if error.errno in OF_INPUT and named else 1)
    finally:
        if IS_COMMAND:
            faulthandler.dump_traceback_later(EXIT_S, exit=True)


def _with_flags(rule: str, flags: Mapping[str, str]) -> str:
    """A rule that names the flags of a command in the place of the keys that they stand for."""
    for key, flag in flags.items():
        if key in KEYS:
            rule = re.sub(rf"(?<![\w.])(--config\.)?{re.escape(key)}(?!\w)", flag, rule)
    return rule


def _exit(message: str, code: int = 2) -> NoReturn:
    """Prints one line, whatever line breaks the message carries from elsewhere, and exits."""
    print(f"error: {printable(' '.join(message.splitlines()))}", file=sys.stderr)
    raise SystemExit(code)


# ---- flags ----


def make_parser(module: str, doc: str | None, usage: str | None = None) -> "Parser":
    """Returns the parser of `python -m MODULE`, whose `--help` begins with the module's docstring.

    A usage error is one line that names the nearest flag, with exit code 2; flags cannot be abbreviated.
    """
    return Parser(
        prog=f"python -m {module}",
        usage=usage and f"python -m {module} {usage}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


class Parser(argparse.ArgumentParser):
    """argparse's, with errors of one line."""

    @property
    def flags(self) -> list[str]:
        return list(self._option_string_actions)

    def parse_args(self, args: Sequence[str] | None = None) -> argparse.Namespace:  # type: ignore[override]
        """Looks for unknown flags first: argparse would rather complain of the flag that was misspelt."""
        args = sys.argv[1:] if args is None else list(args)
        for arg in args:
            flag = arg.partition("=")[0]
            if flag.startswith("--") and flag != "--" and flag not in self.flags:
                self.error(f"{flag}: there is no such flag{nearest(flag, self.flags)}")
        return super().parse_args(args)

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        """Checks the text of all flags but those of keys, which have rules of their own."""
        parsed, unknown = super().parse_known_args(*args, **kwargs)
        for name, value in vars(parsed).items():
            for text in value if isinstance(value, list) else [value]:
                if isinstance(text, str) and not name.startswith("config.") and (broken := broken_text(text)):
                    raise ConfigError(f"--{name}", text, broken)
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        _exit(message)


def config_parser(module: str, doc: str | None, usage: str = USAGE) -> Parser:
    """Returns the parser of a command that takes a configuration: `--config`, `--workdir`, a flag for each key.

    A command may add flags of its own before it hands the parser to `read_command_line`.
    """
    parser = make_parser(module, doc, usage)
    # nargs="?": a flag without its value has None, and is refused in our words.
    parser.add_argument(
        "--config", default="", nargs="?", metavar="FILE.py[:VARIANT]", help="has get_config()"
    )
    parser.add_argument("--workdir", default="", nargs="?", help="default: outputs/PROJECT/EXPERIMENT")
    for key in KEYS:
        parser.add_argument(f"--config.{key}", nargs="?", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    return parser


def parse_command_line(module: str, doc: str | None, argv: list[str] | None = None) -> tuple[Config, Path]:
    """Reads the command line of a command whose only flags are those of the configuration.

    Args:    module, doc: of the command, for `--help`.
    Returns: the checked configuration and the workdir, by default outputs/PROJECT/EXPERIMENT.
    Raises:  ConfigError: as `read_command_line`.
    """
    config, workdir, _ = read_command_line(config_parser(module, doc), argv)
    return config, workdir


def read_command_line(
    parser: Parser, argv: list[str] | None = None
) -> tuple[Config, Path, argparse.Namespace]:
    """Reads the command line of a command that takes a configuration.

    Args:    parser: of `config_parser`.
    Returns: the checked configuration, the workdir, and all flags, the command's own among them; beside them
        `replaced`: the keys that flags have set -> the file's own values.
    Raises:  ConfigError: a bad flag, file, key or value, or the flag of a key that nothing in this run reads.
    """
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        _refuse(unknown[0], parser.flags)
    flags = vars(args).items()
    given = {name.removeprefix("config."): value for name, value in flags if name.startswith("config.")}
    for name, value in (("--config", args.config), ("--workdir", args.workdir), *given.items()):
        if value is None:
            raise ConfigError(name, "", "needs a value")
    raw = _load_config_file(args.config)
    args.replaced = {}
    for key, value in given.items():
        section, _, name = key.partition(".")
        args.replaced[key] = raw[section][name]
        _override(raw, key, value)
    config = parse_config(raw.to_dict())
    unread = unread_keys(config)
    for key in given:
        if key in unread:
            raise ConfigError(key, config.get(key), f"nothing reads it with {unread[key]}")
    default = Path("outputs") / config.logging.project_name / config.logging.experiment_name
    return config, Path(args.workdir or default), args


def _refuse(argument: str, flags: Sequence[str]) -> NoReturn:
    """Says what is wrong with an argument that is none of `flags`."""
    flag, equals, value = argument.partition("=")
    key = flag.removeprefix("--").removeprefix("config.").lstrip("+~").removeprefix(ROOT)
    if key in KEYS and flag != f"--config.{key}":
        raise ConfigError(flag, value, f"write --config.{key}{equals}{value}")
    if known := key_of(key):
        raise ConfigError(flag.removeprefix("--config."), value, f"{OLD_NAME}: here it is --config.{known}")
    if not flag.startswith("--"):
        is_setting = equals and "." in flag
        rule = "is neither a flag nor the value of one"
        rule += "; keys are set as --config.SECTION.KEY=VALUE" if is_setting else ""
        raise ConfigError("command line", flag, rule)
    hint = nearest(flag, flags).replace("--config.", "")
    raise ConfigError(flag.removeprefix("--config."), value, f"there is no such key{hint}")


def _override(config: Any, key: str, value: str) -> None:
    """Sets one key of a `ConfigDict`, as ml_collections reads "--config.SECTION.KEY=VALUE"."""
    from absl import flags
    from ml_collections import config_flags

    if KEYS[key].type == tuple[str, ...] and value[:1] + value[-1:] in ("[]", "()"):
        _check_tuple(key, value)
    argument, values = f"--config.{key}={value}", flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=["", argument])
        values(["grpo_jax", argument])
    except (flags.Error, ValueError, TypeError) as error:
        section, _, name = key.partition(".")
        rules = {bool: "must be True or False", int: "must be a whole number", float: "must be a number"}
        rule = rules.get(type(config[section][name]), str(error).partition(": ")[2] or str(error))
        raise ConfigError(key, value, f"has the wrong type: {rule}") from None


def _check_tuple(key: str, value: str) -> None:
    """Raises: ConfigError: ml_collections would take a list without quotes for one name with brackets."""
    try:
        ast.literal_eval(value)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        words = [word.strip(" '\"") for word in value[1:-1].split(",")]
        written = f'"--config.{key}={tuple(filter(None, words))}"'
        raise ConfigError(key, value, f"a tuple is written with quotes, as {written}") from None


# ---- files ----


def defaults() -> Any:
    """Returns an `ml_collections.ConfigDict` with every key at its default, for a configuration file to change."""
    from ml_collections import ConfigDict

    return ConfigDict(dataclasses.asdict(Config()))


def load_config(path: str | Path, variant: str = "") -> Any:
    """Returns the `ConfigDict` of a configuration file; what the file leaves out has its default.

    Args:   variant: handed to its `get_config`, if there is one.
    Raises: ConfigError: it returns something else. What the file raises comes through.
    """
    from ml_collections import ConfigDict

    get_config = runpy.run_path(str(path)).get("get_config")
    if not callable(get_config):
        raise ConfigError("--config", str(path), "has no function get_config()")
    config = get_config(variant) if variant else get_config()
    if not isinstance(config, ConfigDict):
        raise ConfigError("--config", str(path), "its get_config() must return an ml_collections.ConfigDict")
    _check_names(config, str(path))
    with config.unlocked():
        return _complete(config)


def _check_names(config: Any, path: str) -> None:
    """Raises: ConfigError: a section or a key has a name that is no text."""
    try:
        content = config.to_dict()
    except TypeError:  # ml_collections sorts them
        raise ConfigError("--config", path, "has a key that is no text") from None
    for part in (content, *(part for part in content.values() if isinstance(part, dict))):
        if strange := [name for name in part if not isinstance(name, str)]:
            raise ConfigError("--config", path, f"has a key {strange[0]!r}, which is no text")


def _load_config_file(name: str) -> Any:
    """The `ConfigDict` of FILE.py or FILE.py:VARIANT."""
    path, _, variant = name.partition(":")
    if not name:
        raise ConfigError(
            "--config", name, "must name a configuration file, as --config=configs/quickstart.py"
        )
    if not Path(path).is_file():
        raise ConfigError("--config", name, "is a folder" if Path(path).is_dir() else "there is no such file")
    try:
        return load_config(path, variant)
    except ConfigError:
        raise
    except (Exception, SystemExit) as error:  # the file is the user's, and so is whatever it raises
        raise ConfigError("--config", name, f"cannot be loaded: {describe(error, path)}") from None


def _complete(config: Any) -> Any:
    """Adds the keys that a `ConfigDict` lacks. Unknown ones stay, for `parse_config` to name."""
    from ml_collections import ConfigDict

    for name, key in KEYS.items():
        section, _, field = name.partition(".")
        if section not in config:
            config[section] = {}
        if not isinstance(config[section], ConfigDict):
            raise ConfigError(section, config[section], NO_SECTION)
        if field not in config[section]:
            config[section][field] = key.default
        elif key.type is float and type(config[section][field]) is int:
            with contextlib.suppress(OverflowError), config[section].ignore_type():
                config[section][field] = float(config[section][field])  # or no flag could make 0 to 0.5
    return config
