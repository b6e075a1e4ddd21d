"""How the trainer and its reward workers talk: frames of a length and a body over a socket pair.

A job is pickled, since `extra_info` may hold what Parquet holds. An answer is JSON: the trainer unpickles nothing
that comes out of a process with the user's code in it.

Standard library only, as `worker.py`.
"""

import json
import pickle
import socket
import struct
from collections.abc import Mapping
from typing import Any

Answer = tuple[int | None, str, Any]
"""(number of the job, or None for loading the module; status; value or what happened)"""

MAX_ANSWER_BYTES = 1 << 16
MAX_TEXT = 1000
"""Characters of a message or an explanation: an exception may quote the whole completion."""

_LENGTH = struct.Struct(">Q")


def frame_of_job(number: int, name: str, kwargs: Mapping[str, Any]) -> bytes:
    """Packs a call of the function `name`."""
    return _framed(pickle.dumps((number, name, kwargs), pickle.HIGHEST_PROTOCOL))


def frame_of_answer(number: int | None, status: str, value: float | str | None) -> bytes:
    """Packs an answer. Text is cut at `MAX_TEXT`, and what UTF-8 cannot hold in it is escaped."""
    if isinstance(value, str):
        value = value[:MAX_TEXT].encode("utf-8", "backslashreplace").decode()
    return _framed(json.dumps((number, status, value)).encode())


def read_job(connection: socket.socket) -> tuple[int, str, dict[str, Any]]:
    """Waits for a job. Raises: EOFError: the trainer has closed its end."""
    (length,) = _LENGTH.unpack(_read(connection, _LENGTH.size))
    return pickle.loads(_read(connection, length))


def take_answer(received: bytearray) -> Answer | None:
    """Takes the first answer out of what has been received; None while it is not all there.

    Raises: ValueError: it is none.
    """
    if len(received) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack_from(received)
    if length > MAX_ANSWER_BYTES:
        raise ValueError(f"an answer of {length} bytes")
    end = _LENGTH.size + length
    if len(received) < end:
        return None
    answer = json.loads(received[_LENGTH.size : end])
    if not (isinstance(answer, list) and len(answer) == 3):
        raise ValueError(f"an answer that is {answer!r:.100}")
    del received[:end]
    return answer[0], answer[1], answer[2]


def _framed(body: bytes) -> bytes:
    return _LENGTH.pack(len(body)) + body


def _read(connection: socket.socket, length: int) -> bytes:
    body = bytearray()
    while len(body) < length:
        part = connection.recv(min(length - len(body), 1 << 20))
        if not part:
            raise EOFError
        body += part
    return bytes(body)
