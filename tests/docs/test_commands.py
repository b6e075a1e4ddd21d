"""The commands of the pages are ones that there are: modules, flags, keys, configurations and files."""

import importlib
import re
import sys
import tomllib

import docs_pages as docs
import pytest

from grpo_jax.config import ConfigError
from grpo_jax.config.command_line import Parser, read_command_line
from grpo_jax.config.sections import KEYS, SECTIONS

COMMANDS = [command for page in docs.PAGES for command in docs.commands(page)]
SPANS = [(docs.name(page), span) for page in docs.PAGES for span in docs.spans(page)]
OF_HERE = [
    (docs.name(page), span)
    for page in sorted(docs.DOCS.glob("from_*.md"))
    for span in docs.spans_of_here(page)
]
OF_OTHERS = {f"docs/from_{name}.md" for name in ("verl", "trl", "openrlhf", "tunix")}
"""Pages with the keys and files of other trainers too."""
HISTORY = ("CHANGELOG.md", "docs/decisions/")
"""What was there once may be named."""
PATH = re.compile(r"(?<![\w/.-])(?:configs|examples|benchmarks|launch|tests|docs|grpo_jax|\.ci)/[\w./-]*\w")
PROGRAMS = {
    *(
        "git",
        "cd",
        "pip",
        "hf",
        "modelscope",
        "tensorboard",
        "curl",
        "less",
        "tee",
        "gcloud",
        "pytest",
        "mike",
    ),
    *("export", ".", "$all", "engine/bin/pip", ""),
}
"""First words of commands that are not ours."""


class Parsed(BaseException):
    """Ends a command before its flags are read."""


def parser_of(module, arguments=()):
    """The parser that `python -m MODULE ARGUMENTS` reads its flags with."""
    found = []

    def stop(parser, *_, **__):
        found.append(parser)
        raise Parsed

    command = importlib.import_module(module)
    command = command if hasattr(command, "main") else importlib.import_module(f"{module}.__main__")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parser, "parse_known_args", stop)
        patch.setattr(Parser, "parse_args", stop)
        patch.setattr(sys, "argv", ["command", *(arguments or ["--sample"])])  # doctor alone reads none
        with pytest.raises(Parsed):
            command.main()
    return found[0]


def complaint(command, module, arguments, capsys):
    """What the command would say of its flags, its configuration and its keys: "" for nothing."""
    try:
        parser = parser_of(module, arguments)
        reads_log = any(word.startswith("--log=") for word in arguments)  # doctor, without a configuration
        if "--config" not in parser.flags or reads_log:
            parser.parse_args(arguments)
        elif arguments:
            read_command_line(parser, arguments)
    except (ConfigError, SystemExit, ImportError) as error:
        return f"{command}\n  {type(error).__name__}: {error} {capsys.readouterr().err}"
    return ""


def ours(command):
    """(module, its arguments) of a command that is one of the package, or that starts one; else None."""
    words = ["--config=configs/gsm8k.py" if word == "--config=..." else word for word in command.words]
    if words[:2] == ["python", "-m"] and words[2].startswith("grpo_jax"):
        return words[2], words[3:]
    if words and words[0].startswith("--config."):
        return "grpo_jax.train", ["--config=configs/gsm8k.py", *words]
    if words and words[0].startswith("launch/"):
        name = next((v.partition("=")[2] for v in command.variables if v.startswith("COMMAND=")), "train")
        return f"grpo_jax.{name}", words[1:]
    return None


def test_every_command_of_ours_can_be_read(monkeypatch, capsys):
    """By its own parser, in the repository's root: a wrong flag, key, value or configuration fails."""
    monkeypatch.chdir(docs.ROOT)
    found = [(command, *ours(command)) for command in COMMANDS if ours(command)]
    modules = {module for _, module, _ in found}
    names = "train evaluate export doctor plan fetch audit mismatch inspect report init data.gsm8k data.jsonl"
    assert {f"grpo_jax.{name}" for name in names.split()} <= modules
    assert not [text for parts in found if (text := complaint(*parts, capsys))]


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("python -m grpo_jax.tran --config=configs/gsm8k.py", "No module named 'grpo_jax.tran'"),
        (
            "python -m grpo_jax.train --config=configs/gsm8k.py --config.model.pth=x",
            "did you mean model.path",
        ),
        ("python -m grpo_jax.train --config=configs/gsm9k.py", "there is no such file"),
        ("python -m grpo_jax.plan --config=configs/gsm8k.py --devise=h100", "did you mean"),
        ("python -m grpo_jax.export --checkpoint=W", "--output"),
        ("--config.rollout.top_p=2", "must be"),
        ("COMMAND=doctor launch/slurm.sh --host --config=...", "did you mean"),
    ],
)
def test_what_is_wrong_is_found(line, word, monkeypatch, capsys):
    monkeypatch.chdir(docs.ROOT)
    ((words, variables),) = docs.split(line)
    command = docs.Command("page.md", 1, words, variables)
    assert word in complaint(command, *ours(command), capsys)


def test_every_recipe_has_a_command_on_its_page():
    page = [command for command in COMMANDS if command.page == "docs/recipes.md"]
    shown = {word.removeprefix("--config=") for command in page for word in command.words}
    assert {f"configs/{file.name}" for file in (docs.ROOT / "configs").glob("*.py")} <= shown


def test_python_that_is_shown_can_be_compiled():
    blocks = [
        (docs.name(page), b[3])
        for page in docs.PAGES
        for b in docs.FENCE.finditer(page.read_text())
        if b[2] == "python"
    ]
    assert len(blocks) > 8
    for page, block in blocks:
        compile(block, page, "exec")


def test_every_script_is_there_and_has_the_flags():
    for command in COMMANDS:
        if command.words[:1] == ("python",) and command.words[1].endswith(".py"):
            text = (docs.ROOT / command.words[1]).read_text() + (
                docs.ROOT / "benchmarks/common.py"
            ).read_text()
            flags = [word.partition("=")[0] for word in command.words if word.startswith("--")]
            keys = [flag.removeprefix("--config.") for flag in flags if flag.startswith("--config.")]
            assert all(key in KEYS for key in keys), command
            assert all(f'"{flag}"' in text for flag in flags if not flag.startswith("--config.")), command


def test_every_other_program_is_a_known_one():
    for command in COMMANDS:
        first = command.words[0] if command.words else ""
        known = first in PROGRAMS or first.startswith(("--config.", "launch/", "python")) or first == "bash"
        assert known, f"{command}: add {first} to PROGRAMS, with a reason in test_commands_run.py"


def test_extras_that_pip_is_asked_for_are_there():
    project = tomllib.loads((docs.ROOT / "pyproject.toml").read_text())["project"]
    asked = {m for page in docs.PAGES for m in re.findall(r"-e '\.\[([\w,]+)\]'", page.read_text())}
    assert {"gpu,vllm", "tpu", "test"} <= asked
    assert {extra for extras in asked for extra in extras.split(",")} <= set(project["optional-dependencies"])


def test_files_that_are_named_are_there():
    """In commands and in words set as code."""
    texts = [(c.page, word) for c in COMMANDS for word in (*c.words, *c.variables)] + SPANS
    texts = [(page, text) for page, text in texts if page not in OF_OTHERS and not page.startswith(HISTORY)]
    named = {(page, path) for page, text in texts for path in PATH.findall(text)}
    assert len(named) > 100
    assert not sorted(f"{page}: {path}" for page, path in named if not (docs.ROOT / path).exists())


def test_keys_that_are_named_are_there():
    """`--config.KEY` anywhere, and what looks like a key among words set as code."""
    sections = "|".join(SECTIONS)
    for page in docs.PAGES:
        for key in re.findall(r"--config\.([a-z_]+\.[a-z_0-9]+)", page.read_text()):
            assert key in KEYS, (docs.name(page), key)
    spans = [(page, span) for page, span in SPANS if page not in OF_OTHERS and not page.startswith(HISTORY)]
    assert len(OF_HERE) > 200
    for page, span in spans + OF_HERE:
        for key in re.findall(rf"(?<![\w./-])(?:{sections})\.(?!safetensors|parquet|py)[a-z_0-9]+", span):
            assert key in KEYS, (page, key)


def test_commands_that_the_text_names_are_there():
    for page, span in SPANS:
        for module, rest in re.findall(r"python -m (grpo_jax\.(?:data\.)?\w+)(?![\w.])([^|;&]*)", span):
            named = re.findall(r"(?<!\S)\[?(--[a-z_]+)", rest)
            flags = parser_of(module, named).flags
            for flag in named:
                assert flag in flags, (page, span)
