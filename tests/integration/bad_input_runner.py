"""Runs commands that must be refused, one after the other, where touching a device would be an error.

    JAX_PLATFORMS=no_such_platform python bad_input_runner.py ROOT < CASES.json > RESULTS.json

A case is [module, arguments]. Its result holds the exit code, what was printed, how long it took, and whether
anything below ROOT has changed.
"""

import importlib
import json
import sys
import time
from pathlib import Path

import integration_helpers as helpers
import jax


def stamps(root):
    """Path -> what tells a file that was written from one that was not, quicker than its content does."""
    return {
        str(path): (held.st_ino, held.st_size, held.st_mtime_ns)
        for path in root.rglob("*")
        if (held := path.stat()) is not None
    }


def main(root):
    results, before = {}, stamps(root)
    for name, (module, argv) in json.load(sys.stdin).items():
        start = time.perf_counter()
        try:
            result = helpers.call(importlib.import_module(module).main, argv)
            code, out, err = result.code, result.out, result.err
        except BaseException as error:  # what a user would see as a traceback
            code, out, err = 1, "", f"{type(error).__name__}: {error}"
        seconds, after = time.perf_counter() - start, stamps(root)
        results[name] = {
            "code": code,
            "out": out,
            "err": err,
            "unchanged": after == before,
            "seconds": seconds,
        }
        before = after
    try:
        jax.devices()
        raise SystemExit("there are devices after all: the cases prove nothing")
    except RuntimeError as error:
        assert "no_such_platform" in str(error)
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
