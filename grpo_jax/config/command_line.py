"""What every command shares: a user's mistake ends in one line on stderr and exit code 2.

Standard library only, so that `--help` and a mistyped flag answer at once.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import NoReturn

from grpo_jax.config import ConfigError, nearest


@contextlib.contextmanager
def one_line_errors(flags: Mapping[str, str] | None = None) -> Iterator[None]:
    """Turns a `ConfigError` into `error: ...` on stderr and exit code 2. Works as a decorator too.

    Args: flags: configuration key -> the flag by which this command's user set it.
    """
    try:
        yield
    except ConfigError as error:
        name = (flags or {}).get(error.key, error.key)
        _exit(str(ConfigError(name, error.value, error.rule)))


def make_parser(module: str, doc: str | None) -> argparse.ArgumentParser:
    """Returns the parser of `python -m MODULE`, whose `--help` begins with the module's docstring.

    A usage error is one line that names the nearest flag, with exit code 2; flags cannot be abbreviated.
    """
    return _Parser(
        prog=f"python -m {module}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


class _Parser(argparse.ArgumentParser):
    def parse_args(self, args: Sequence[str] | None = None) -> argparse.Namespace:  # type: ignore[override]
        """Looks for unknown flags first: argparse would rather complain of the flag that was misspelt."""
        args = sys.argv[1:] if args is None else list(args)
        for arg in args:
            flag = arg.partition("=")[0]
            if flag.startswith("--") and flag != "--" and flag not in self._option_string_actions:
                self.error(f"{flag}: there is no such flag{nearest(flag, self._option_string_actions)}")
        return super().parse_args(args)

    def error(self, message: str) -> NoReturn:
        _exit(message)


def _exit(message: str) -> NoReturn:
    """Prints one line, whatever line breaks the message carries from elsewhere, and exits with 2."""
    print(f"error: {' '.join(message.splitlines())}", file=sys.stderr)
    raise SystemExit(2)
