"""Whatever is written into a configuration: it can be written down and read again, or one line says why not.

The examples are random, and the same in every run.
"""

import contextlib
import io
import json

import fuzz_helpers as fuzz
from config_helpers import CONFIGS, gsm8k
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_jax import plan
from grpo_jax.config import KEYS, Config, ConfigError, parse_config, unread_keys, unread_warning
from grpo_jax.config.command_line import config_parser, read_command_line

PARSER = config_parser("grpo_jax.train", "")
NAMES = st.sampled_from(list(KEYS))
SPELT = st.one_of(
    fuzz.SCALARS.map(str),
    fuzz.SCALARS.map(repr),
    st.lists(fuzz.SCALARS, max_size=3).map(repr),
    st.lists(fuzz.SCALARS, max_size=3).map(tuple).map(repr),
    st.sampled_from(
        [
            *(
                "9" * 5000,
                "(" * 500,
                "((((1,),),),)",
                "{1: 2}",
                "lambda: 0",
                "1e999",
                "0x10",
                "1_0",
                "'",
                '"',
            ),
            *("\\", "--config", "=", "[1,2", "__import__('os')", "f''", "b'x'", "10**1000000"),
        ]
    ),
)
"""Values as one writes them in a shell."""
DRAWN = """
import fuzz_helpers
from ml_collections import ConfigDict

def get_config():
    return ConfigDict(fuzz_helpers.DRAWN)
"""
"""A configuration file that returns what has been drawn."""


def read(argv):
    return read_command_line(PARSER, argv)[0]


def check(make):
    """`make` returns a configuration that is the same after it was written to config.json, or refuses."""
    try:
        config = make()
    except ConfigError as error:
        return fuzz.check_refusal(error)
    assert isinstance(config, Config)
    assert parse_config(json.loads(json.dumps(config.to_dict()))) == config
    assert set(unread_keys(config)) <= set(KEYS) and "\n" not in unread_warning(config)
    for name in KEYS:
        value = config.get(name)
        assert all(
            type(x) in (bool, int, float, str) for x in (value if isinstance(value, tuple) else [value])
        )


@fuzz.lengths(60, 2000)
def test_values_of_any_type(num_examples):
    shipped = gsm8k().to_dict()

    @settings(fuzz.STEADY, max_examples=num_examples)
    @given(changes=st.dictionaries(NAMES, fuzz.VALUES, min_size=1, max_size=3))
    def holds(changes):
        config = {section: dict(keys) for section, keys in shipped.items()}
        for name, value in changes.items():
            section, _, key = name.partition(".")
            config[section][key] = value
        check(lambda: parse_config(config))

    holds()


@fuzz.lengths(60, 2000)
def test_flags_of_any_value(num_examples):
    @settings(fuzz.STEADY, max_examples=num_examples)
    @given(changes=st.dictionaries(NAMES, SPELT, min_size=1, max_size=2))
    def holds(changes):
        flags = [f"--config.{name}={value}" for name, value in changes.items()]
        check(lambda: read([f"--config={CONFIGS / 'gsm8k.py'}", *flags]))

    holds()


@fuzz.lengths(60, 2000)
def test_files_of_any_content(num_examples, tmp_path, monkeypatch):
    """What get_config() returns: sections and keys of any name, values of any type."""
    sections, keys = (st.sampled_from([name.split(".")[i] for name in KEYS]) for i in (0, 1))
    odd = fuzz.ANY_TEXT | st.integers()
    contents = st.dictionaries(keys | odd, fuzz.VALUES, max_size=2)
    (tmp_path / "drawn.py").write_text(DRAWN)

    @settings(fuzz.STEADY, max_examples=num_examples)
    @given(config=st.dictionaries(sections | odd, contents | contents | fuzz.VALUES, max_size=3))
    def holds(config):
        monkeypatch.setattr(fuzz, "DRAWN", config, raising=False)
        check(lambda: read([f"--config={tmp_path / 'drawn.py'}"]))

    holds()


@fuzz.lengths(60, 2000)
def test_a_file_of_any_text(num_examples, tmp_path):
    """Code that may not even be Python: bytes, half a program, or one that returns something else."""
    file = tmp_path / "text.py"
    programs = st.sampled_from(
        ["raise SystemExit", "import no_such", "get_config = 3", "def get_config(a, b): 0"]
    )

    @settings(fuzz.STEADY, max_examples=num_examples)
    @given(content=st.binary(max_size=30) | programs.map(str.encode))
    def holds(content):
        file.write_bytes(content)
        with contextlib.redirect_stderr(io.StringIO()):
            check(lambda: read([f"--config={file}"]))

    holds()


SIZES = [
    name
    for name, key in KEYS.items()
    if key.type in (int, float)
    and name.split(".")[0] in ("data", "random_model", "algorithm", "actor", "mesh")
]


@fuzz.lengths(5, 200)
def test_a_plan_of_any_sizes(num_examples, capsys):
    """The largest part of `plan`, the memory and time of a step, is there for whatever is accepted."""
    values = st.one_of(st.integers(1, 9), st.integers(1, 2**31 - 1), st.floats(0, 1))

    @settings(fuzz.STEADY, max_examples=num_examples)
    @given(changes=st.dictionaries(st.sampled_from(SIZES), values, min_size=1, max_size=3))
    def holds(changes):
        flags = [f"--config.{name}={value}" for name, value in changes.items()]
        argv = [f"--config={CONFIGS / 'quickstart.py'}", "--device=h100", "--num_devices=8", *flags]
        capsys.readouterr()
        try:
            plan.main(argv)
        except SystemExit as stop:
            captured = capsys.readouterr()
            assert stop.code == 2 and captured.err.startswith("error: ") and captured.err.count("\n") == 1
            assert not captured.out

    holds()
