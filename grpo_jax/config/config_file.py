"""The command line of the commands that take a configuration:

    --config=FILE.py[:VARIANT] [--workdir=DIR] [--config.SECTION.KEY=VALUE ...]

`ml_collections` parses it; this module turns whatever it complains of into one line.
"""

import json
import runpy
import sys
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

from grpo_jax.config import Config, ConfigError, known_keys, nearest, parse_config

USAGE = "--config=FILE.py[:VARIANT] [--workdir=DIR] [--config.SECTION.KEY=VALUE ...]"


def parse_command_line(module: str, doc: str | None, argv: list[str] | None = None) -> tuple[Config, Path]:
    """Reads the configuration named on the command line.

    Args:    module, doc: of the command, for `--help`.
    Returns: the checked configuration and the workdir, by default outputs/PROJECT/EXPERIMENT.
    Raises:  ConfigError: a bad flag, file, key or value.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(f"usage: python -m {module} {USAGE}\n\n{doc}")
        raise SystemExit(0)
    options = _split_flags(argv)
    raw = _load_config_file(options.pop("--config", ""))
    workdir = options.pop("--workdir", "")
    for flag, value in options.items():
        _override(raw, flag, value)
    config = parse_config(raw.to_dict())
    default = Path("outputs") / config.logging.project_name / config.logging.experiment_name
    return config, Path(workdir or default)


def load_saved_config(path: Path) -> Config:
    """Reads the config.json of a workdir.

    Raises: ConfigError: it is missing, damaged, or of a version with other keys.
    """
    try:
        return parse_config(json.loads(path.read_text()))
    except FileNotFoundError:
        raise ConfigError("--workdir", str(path), "there is no such file") from None
    except json.JSONDecodeError as error:
        raise ConfigError("--workdir", str(path), f"is not JSON ({error})") from None


def _split_flags(argv: list[str]) -> dict[str, str]:
    """Flag -> value, from "--flag=value" and "--flag value"; refuses flags and keys that do not exist."""
    known = {*(f"--config.{key}" for key in known_keys()), "--config", "--workdir"}
    options: dict[str, str] = {}
    rest = list(argv)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        if not flag.startswith("--"):
            raise ConfigError("command line", flag, "is neither a flag nor the value of one")
        if flag not in known:
            hint = nearest(flag, known).replace("--config.", "")
            raise ConfigError(flag.removeprefix("--config."), value, f"there is no such key{hint}")
        if not equals and not rest:
            raise ConfigError(flag.removeprefix("--config."), "", "needs a value")
        options[flag] = value if equals else rest.pop(0)
    return options


def _override(config: ConfigDict, flag: str, value: str) -> None:
    """Sets one key of `config`, as ml_collections reads "--config.SECTION.KEY=VALUE"."""
    key, argument, values = flag.removeprefix("--config."), f"{flag}={value}", flags.FlagValues()
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=["", argument])
        values(["grpo_jax", argument])
    except (flags.Error, ValueError, TypeError) as error:
        section, _, name = key.partition(".")
        rules = {bool: "must be True or False", int: "must be a whole number", float: "must be a number"}
        rule = rules.get(type(config[section][name]), str(error).partition(": ")[2] or str(error))
        raise ConfigError(key, value, f"has the wrong type: {rule}") from None


def _load_config_file(name: str) -> ConfigDict:
    """Calls get_config(), or get_config(VARIANT), of FILE.py or FILE.py:VARIANT."""
    path, _, variant = name.partition(":")
    if not name:
        raise ConfigError(
            "--config", name, "must name a configuration file, as --config=configs/quickstart.py"
        )
    if not Path(path).is_file():
        raise ConfigError("--config", name, "there is no such file")
    try:
        get_config = runpy.run_path(path)["get_config"]
        config = get_config(variant) if variant else get_config()
    except Exception as error:  # the file is the user's, and so is whatever it raises
        raise ConfigError("--config", name, f"cannot be loaded: {type(error).__name__}: {error}") from None
    if not isinstance(config, ConfigDict):
        raise ConfigError("--config", name, "its get_config() must return an ml_collections.ConfigDict")
    return config
