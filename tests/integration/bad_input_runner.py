"""Runs commands that must be refused, one after the other, where touching a device would be an error.

    JAX_PLATFORMS=no_such_platform python bad_input_runner.py ROOT < CASES.json > RESULTS.json

A case is [module, arguments]. Its result holds the exit code, what was printed, and whether anything below
ROOT has changed.
"""

import importlib
import json
import sys
from pathlib import Path

import integration_helpers as helpers
import jax


def main(root):
    results = {}
    for name, (module, argv) in json.load(sys.stdin).items():
        before = helpers.tree_digest(root)
        try:
            result = helpers.call(importlib.import_module(module).main, argv)
            code, out, err = result.code, result.out, result.err
        except BaseException as error:  # what a user would see as a traceback
            code, out, err = 1, "", f"{type(error).__name__}: {error}"
        unchanged = helpers.tree_digest(root) == before
        results[name] = {"code": code, "out": out, "err": err, "unchanged": unchanged}
    try:
        jax.devices()
        raise SystemExit("there are devices after all: the cases prove nothing")
    except RuntimeError as error:
        assert "no_such_platform" in str(error)
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
