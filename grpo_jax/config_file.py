"""The command line of the commands that take a configuration:

    --config=FILE.py[:VARIANT] [--workdir=DIR] [--config.SECTION.KEY=VALUE ...]

`ml_collections` parses it; this module turns whatever it complains of into one line.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from grpo_jax.config import Config, ConfigError, known_keys, nearest, parse_config

OTHER_FLAGS = ("--config", "--workdir", "--help")


def parse_command_line(module: str, doc: str | None, argv: list[str] | None = None) -> tuple[Config, Path]:
    """Reads the configuration named on the command line.

    Args:    module, doc: of the command, for `--help`.
    Returns: the checked configuration and the workdir, by default outputs/PROJECT/EXPERIMENT.
    Raises:  ConfigError: a bad flag, file, key or value.
    """
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(
            f"usage: python -m {module} {(__doc__ or '').split(':', 1)[1].split('`ml')[0].strip()}\n\n{doc}"
        )
        raise SystemExit(0)
    file = _check_flags(argv)
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    flags.DEFINE_string("workdir", "", "where everything is written", flag_values=values)
    try:
        values(["grpo_jax", *argv])
        raw: Any = values["config"].value
        if not hasattr(raw, "to_dict"):  # ml_collections keeps the error until the first use
            raise ConfigError("--config", file, _loading_error(file))
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise _override_error(argv, error) from None
    config = parse_config(raw.to_dict())
    default = Path("outputs") / config.logging.project_name / config.logging.experiment_name
    return config, Path(values["workdir"].value or default)


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


def _check_flags(argv: list[str]) -> str:
    """Refuses flags and keys that do not exist; returns the config file's name."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    file = parser.parse_known_args(argv)[0].config
    if not file:
        raise ConfigError(
            "--config", file, "must name a configuration file, as --config=configs/quickstart.py"
        )
    if not Path(file.split(":")[0]).is_file():
        raise ConfigError("--config", file, "there is no such file")
    keys = {f"--config.{key}" for key in known_keys()}
    expects_value = False
    for arg in argv:
        name, equals, _ = arg.partition("=")
        if expects_value:
            expects_value = False
        elif not name.startswith("--"):
            raise ConfigError("command line", arg, "is neither a flag nor a flag's value")
        elif name not in keys and name not in OTHER_FLAGS:
            hint = nearest(name, keys | set(OTHER_FLAGS))
            raise ConfigError(name.removeprefix("--config."), arg, f"there is no such key{hint}")
        else:
            expects_value = not equals
    return file


def _loading_error(file: str) -> str:
    """Loads the file once more, for the reason why it could not be loaded."""
    import runpy

    path, _, variant = file.partition(":")
    try:
        get_config = runpy.run_path(path)["get_config"]
        get_config(variant) if variant else get_config()
    except Exception as error:
        return f"cannot be loaded: {type(error).__name__}: {error}"
    return "its get_config() must return an ml_collections.ConfigDict"


def _override_error(argv: list[str], error: Exception) -> ConfigError:
    text = str(error)
    for arg in argv:
        name, _, value = arg.partition("=")
        if name.startswith("--config.") and (name in text or arg in text):
            return ConfigError(name.removeprefix("--config."), value, f"has the wrong type: {text}")
    return ConfigError("command line", " ".join(argv), text)


def to_json(config: Config) -> dict[str, Any]:
    """What config.json holds."""
    return json.loads(json.dumps(config.to_dict()))
