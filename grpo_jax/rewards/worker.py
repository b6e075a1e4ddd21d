"""The process that runs reward functions: `python -m grpo_jax.rewards.worker FD MODULE FUNCTION`.

`pool.py` starts it and talks to it over the socket FD (`messages.py`). It loads MODULE (a dotted name, or the path
of a .py file) and answers "ok"; then each call that comes in is answered by "ok" and a float from FUNCTION or a
string from any other, by "error" and what happened, or by "unreadable" and why after an `UnreadableError`.

A function may fork, and its child may come back here: only the process that was started answers.

Standard library only: a worker should be there in a tenth of a second, and never touch an accelerator.
"""

import contextlib
import inspect
import os
import signal
import socket
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from grpo_jax.config.user_code import check_function, describe, load_module
from grpo_jax.rewards import UnreadableError, messages

FLOAT32_MAX = 3.4028234e38


def main(fd: int, module_name: str, function_name: str) -> None:
    """Answers requests until the other end is closed."""
    connection, own = socket.socket(fileno=fd), os.getpid()
    _keep_to_itself(connection)
    # What a function prints is for the user, at once, and must not get between the lines of our output.
    os.dup2(2, 1)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    try:
        module = load_module(module_name)
        check_function(module, function_name)
        _check_arguments(getattr(module, function_name))
    except BaseException as error:
        _leave_if_forked(own, error)
        connection.sendall(messages.frame_of_answer(None, "error", describe(error, module_name)))
        return
    _leave_if_forked(own)
    connection.sendall(messages.frame_of_answer(None, "ok", None))
    while True:
        try:
            number, name, kwargs = messages.read_job(connection)
        except EOFError:
            return
        try:
            status, value = _call(module, name, kwargs, is_score=name == function_name)
        except BaseException as error:  # sys.exit() included: only the function's own, not the run's
            _leave_if_forked(own, error)
            status, value = "error", f"raised {describe(error, module_name)}"
        _leave_if_forked(own)
        connection.sendall(messages.frame_of_answer(number, status, value))


ARGUMENTS = ("data_source", "solution_str", "ground_truth", "extra_info")
"""By which a function is called, all by name; as `base.arguments` gives them."""


def _check_arguments(function: Any) -> None:
    """Raises: TypeError: a function cannot be called with `ARGUMENTS`."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # written in C, it does not say
        return
    try:
        signature.bind(**dict.fromkeys(ARGUMENTS))
    except TypeError as error:
        raise TypeError(
            f"it is called with {', '.join(ARGUMENTS)} by name, and that fails: {error}"
        ) from None


def _keep_to_itself(connection: socket.socket) -> None:
    """Keeps children away from the connection, and SIGTERM away from this process but not from its children.

    systemd and Slurm send SIGTERM to every process of a job, and the trainer has its last step's rewards to come.
    """
    connection.set_inheritable(False)
    signal.signal(signal.SIGTERM, lambda *_: None)  # not SIG_IGN, which programs that it starts would inherit

    def in_child() -> None:
        connection.close()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    os.register_at_fork(after_in_child=in_child)


def _leave_if_forked(own: int, error: BaseException | None = None) -> None:
    """Ends this process if it is not the one with the id `own`, with the exit code that `error` stands for."""
    if os.getpid() == own:
        return
    if isinstance(error, SystemExit):
        os._exit(error.code & 0xFF if isinstance(error.code, int) else int(error.code is not None))
    os._exit(int(error is not None))


def _call(
    module: ModuleType, name: str, kwargs: Mapping[str, Any], *, is_score: bool
) -> tuple[str, float | str]:
    """Returns the status and value of the answer. What the function raises is raised."""
    try:
        value = getattr(module, name)(**kwargs)
    except UnreadableError as error:
        return "unreadable", str(error)
    try:
        return "ok", as_score(value) if is_score else str(value)
    except Exception as error:
        return "error", f"returned {error}"


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
    with contextlib.suppress(ConnectionError):  # the trainer was killed before it had read all
        main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
