"""What every command shares: its flags, its configuration file, and one line on stderr for a user's mistake.

Standard library only until a file is read, so that `--help` and a mistyped flag answer at once. The commands that
take a configuration have the command line

    --config=FILE.py[:VARIANT] [--workdir=DIR] [--config.SECTION.KEY=VALUE ...]

FILE.py has `get_config()`, or `get_config(VARIANT)`, which returns an `ml_collections.ConfigDict`. What it leaves
out has its default.
"""

import argparse
import contextlib
import dataclasses
import faulthandler
import os
import runpy
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from grpo_jax.config.rules import NO_SECTION, ConfigError, nearest, parse_config, unread_keys
from grpo_jax.config.sections import KEYS, Config
from grpo_jax.config.user_code import describe

USAGE = "--config=FILE.py[:VARIANT] [--workdir=DIR] [--config.SECTION.KEY=VALUE ...]"


INTERRUPTED = 130
"""Exit code after Ctrl-C or SIGTERM, as shells have it."""


START_S, EXIT_S = 7200.0, 600.0
"""What a command may take until it watches its phases itself (`run/hangs.py`), or in all where it does not; and
what Python may take to end it, which waits for threads of libraries."""


def _interrupted(number: int, frame: Any) -> None:
    print("Interrupted before anything was done.", file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)  # an exception would end as some import's traceback


# Here, because commands import this first, and then JAX and more for seconds. Who imports it for other reasons
# keeps his handlers.
IS_COMMAND = str(getattr(sys.modules["__main__"].__spec__, "name", "")).startswith("grpo_jax.")
if IS_COMMAND:
    faulthandler.dump_traceback_later(START_S, exit=True)
    for _number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(_number, _interrupted)


@contextlib.contextmanager
def one_line_errors(flags: Mapping[str, str] | None = None) -> Iterator[None]:
    """Turns a `ConfigError` into `error: ...` on stderr and exit code 2, Ctrl-C and SIGTERM into one line and 130.

    Works as a decorator too. For everything that a command does, from its first line on.

    Args: flags: configuration key -> the flag by which this command's user set it.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is _interrupted:
            signal.signal(number, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None
    except ConfigError as error:
        name = (flags or {}).get(error.key, error.key)
        _exit(str(ConfigError(name, error.value, error.rule)))
    finally:
        if IS_COMMAND:
            faulthandler.dump_traceback_later(EXIT_S, exit=True)


def _exit(message: str) -> NoReturn:
    """Prints one line, whatever line breaks the message carries from elsewhere, and exits with 2."""
    print(f"error: {' '.join(message.splitlines())}", file=sys.stderr)
    raise SystemExit(2)


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
    Returns: the checked configuration, the workdir, and all flags, the command's own among them.
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
    for key, value in given.items():
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
    flag, _, value = argument.partition("=")
    if not flag.startswith("--"):
        raise ConfigError("command line", flag, "is neither a flag nor the value of one")
    hint = nearest(flag, flags).replace("--config.", "")
    raise ConfigError(flag.removeprefix("--config."), value, f"there is no such key{hint}")


def _override(config: Any, key: str, value: str) -> None:
    """Sets one key of a `ConfigDict`, as ml_collections reads "--config.SECTION.KEY=VALUE"."""
    from absl import flags
    from ml_collections import config_flags

    argument, values = f"--config.{key}={value}", flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=["", argument])
        values(["grpo_jax", argument])
    except (flags.Error, ValueError, TypeError) as error:
        section, _, name = key.partition(".")
        rules = {bool: "must be True or False", int: "must be a whole number", float: "must be a number"}
        rule = rules.get(type(config[section][name]), str(error).partition(": ")[2] or str(error))
        raise ConfigError(key, value, f"has the wrong type: {rule}") from None


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
    if strange := [name for name in config if not isinstance(name, str)]:
        raise ConfigError("--config", str(path), f"has a section named {strange[0]!r}, which is no text")
    with config.unlocked():
        return _complete(config)


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
            with config[section].ignore_type():  # or no flag could make 0 to 0.5
                config[section][field] = float(config[section][field])
    return config
