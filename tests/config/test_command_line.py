"""The command line of a command that takes a configuration, and the files that it reads."""

import errno
import pathlib
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from grpo_jax import plan
from grpo_jax.config import KEYS, Config, ConfigError, command_line, defaults, load_config, parse_config
from grpo_jax.config.command_line import config_parser, parse_command_line, read_command_line
from grpo_jax.config.old_names import TRL, VERL

ROOT = pathlib.Path(__file__).resolve().parents[2]
PART = """
from ml_collections import ConfigDict

def get_config(variant="random"):
    data = {"arithmetic": {"num_train": 10, "num_val": 1}}
    return ConfigDict({"model": {"path": variant}, "optim": {"max_grad_norm": 2}} | data)
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "part.py"
    path.write_text(PART)
    return path


def parse(file, *argv):
    return parse_command_line("grpo_jax.train", "", [f"--config={file}", *argv])[0]


def refusal(file, *argv):
    with pytest.raises(ConfigError) as caught:
        parse(file, *argv)
    return str(caught.value)


# Flags


def test_both_ways_to_write_a_flag_and_the_last_one_wins(file):
    argv = [
        "--config.mesh.fsdp",
        "-1",
        "--config.trainer.seed=1",
        "--config.trainer.seed",
        "2",
        "--workdir",
        "w",
    ]
    config, workdir = parse_command_line("grpo_jax.train", "", ["--config", str(file), *argv])
    assert (config.mesh.fsdp, config.trainer.seed, str(workdir)) == (-1, 2, "w")
    config, workdir = parse_command_line(
        "grpo_jax.train", "", [f"--config={file}", "--config=absent.py", f"--config={file}"]
    )
    assert str(workdir) == "outputs/grpo_jax/default"


def test_values_are_read_by_the_type_of_their_key(file):
    flags = ["shuffle=False", "max_prompt_length=7", "overlong_prompts=truncate"]
    config = parse(file, *(f"--config.data.{flag}" for flag in flags), "--config.optim.learning_rate=1",
                   "--config.rollout.stop_token_ids=(3,4)", "--config.rollout.engine_args=a=1")  # fmt: skip
    assert (config.data.shuffle, config.data.max_prompt_length) == (False, 7)
    assert isinstance(config.optim.learning_rate, float) and config.rollout.stop_token_ids == (3, 4)
    assert config.rollout.engine_args == ("a=1",) and config.data.overlong_prompts == "truncate"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config.trainer.sed=1"], "trainer.sed='1': there is no such key (did you mean trainer.seed?)"),
        (["--config.trainer.sed", "1"], "trainer.sed='': there is no such key (did you mean trainer.seed?)"),
        (["--workdr=a"], "--workdr='a': there is no such key (did you mean --workdir?)"),
        (["--conf=a"], "--conf='a': there is no such key (did you mean --config?)"),
        (["stray"], "command line='stray': is neither a flag nor the value of one"),
        (["-x"], "command line='-x': is neither a flag nor the value of one"),
        (["--config.trainer.seed"], "trainer.seed='': needs a value"),
        (["--config.trainer.seed", "--workdir=a"], "trainer.seed='': needs a value"),
        (["--workdir"], "--workdir='': needs a value"),
        (["--config"], "--config='': needs a value"),
        (["--config="], "--config='': must name a configuration file, as --config=configs/quickstart.py"),
        (["--config.trainer.seed=one"], "trainer.seed='one': has the wrong type: must be a whole number"),
        (["--config.trainer.seed=-1"], "trainer.seed=-1: must be at least 0"),
    ],
)
def test_a_bad_flag_is_named(file, argv, message):
    assert refusal(file, *argv) == message


def test_a_key_that_nothing_reads_is_refused_with_the_reason(file):
    assert refusal(file, "--config.data.train_files=a.parquet") == (
        "data.train_files=('a.parquet',): nothing reads it with arithmetic.num_train=10"
    )
    # Whatever its value: it was meant to do something.
    assert refusal(file, "--config.algorithm.kl_estimator=k3").endswith(
        "nothing reads it with algorithm.kl_coef=0.0"
    )
    parse(file, "--config.algorithm.kl_estimator=k2", "--config.algorithm.kl_coef=0.1")
    # A rule that says more comes first.
    assert "needs algorithm.kl_coef above 0" in refusal(file, "--config.algorithm.kl_target=0.1")


def test_a_command_may_have_flags_of_its_own(file, capsys, monkeypatch):
    parser = config_parser("grpo_jax.plan", "")
    parser.add_argument("--device", default="")
    config, _, args = read_command_line(
        parser, [f"--config={file}", "--device", "h100", "--config.trainer.seed=3"]
    )
    assert (args.device, config.trainer.seed) == ("h100", 3)
    for argv, message in (
        (["--devise=h100"], "--devise='h100': there is no such key (did you mean --device?)"),
        (
            ["--device=h100", "--num_devices=two"],
            "--num_devices='two': must be a number of devices, at least 1",
        ),
        (
            ["--device", "h20", "--config.mesh.fsdp=1"],
            "--device='h20': must be a number of GB or one of h100",
        ),
    ):
        monkeypatch.setattr("sys.argv", ["plan", f"--config={file}", *argv])
        with pytest.raises(SystemExit, match="2"):
            plan.main()
        assert capsys.readouterr().err.startswith(f"error: {message}")


def test_help_and_a_bad_flag_import_nothing_heavy():
    code = """if True:
        import sys
        from grpo_jax.config import command_line
        for argv in (["--help"], ["--nonsense"], ["--config=absent.py"]):
            try:
                with command_line.one_line_errors():
                    command_line.parse_command_line("grpo_jax.train", "What it does.", argv)
            except SystemExit as stop:
                print(stop.code)
        print(sorted({"absl", "ml_collections", "jax", "numpy"} & sys.modules.keys()))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("usage: python -m grpo_jax.train --config=FILE.py[:VARIANT]"), done.stderr
    assert "What it does." in done.stdout and done.stdout.endswith("0\n2\n2\n[]\n")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            PermissionError(errno.EACCES, "Permission denied", "run/config.json"),
            2,
            "run/config.json: Permission denied",
        ),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x"), 2, "x: File name too long"),
        (OSError(errno.ENOSPC, "No space left on device", "run/a"), 1, "run/a: No space left on device"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), 1, "No such file or directory"),
    ],
)
def test_an_error_of_a_file_is_a_line(error, code, line, capsys):
    """2 where the user named the file wrongly, 1 where something failed."""
    with pytest.raises(SystemExit) as caught, command_line.one_line_errors():
        raise error
    assert caught.value.code == code and capsys.readouterr().err == f"error: {line}\n"


def test_a_long_value_is_shown_in_short(capsys):
    with pytest.raises(SystemExit), command_line.one_line_errors():
        raise ConfigError("model.path", "a" + "x" * 10_000 + "b", "is long")
    line = capsys.readouterr().err
    assert line.startswith("error: model.path='axxx") and line.endswith("xb' (10004 characters): is long\n")
    assert len(line) < 400


# Files


def test_the_defaults_are_whole_and_can_be_changed():
    config = defaults()
    assert isinstance(config, ConfigDict) and config.to_dict() == command_line.dataclasses.asdict(Config())
    config.model.path = "m"
    config.data.update(train_files=("a",), val_files=("b",))
    assert parse_config(config).model.path == "m" and defaults().model.path == ""


def test_what_a_file_leaves_out_has_its_default(file):
    config = parse(file)
    assert (config.model.path, config.arithmetic.num_train) == ("random", 10)
    assert config.rollout == Config().rollout and config.model.dtype == "bfloat16"
    assert parse(f"{file}:folder").model.path == "folder"
    # A number that the file gives as a whole one is still a float.
    assert parse(file, "--config.optim.max_grad_norm=0.5").optim.max_grad_norm == 0.5


def test_a_file_may_build_on_another(file, tmp_path):
    derived = tmp_path / "derived.py"
    derived.write_text(f"""
import runpy

from grpo_jax.config import load_config

def get_config(variant="load"):
    if variant == "load":
        config = load_config({str(file)!r}, "folder")
    else:
        config = runpy.run_path("configs/gsm8k.py")["get_config"]()
    config.trainer.seed = 5
    config.algorithm.update(group_size=8)
    return config
""")
    config = parse(derived)
    assert (config.model.path, config.trainer.seed, config.algorithm.group_size) == ("folder", 5, 8)
    config = parse(f"{derived}:runpy")
    assert (config.data.train_batch_size, config.trainer.seed) == (256, 5)


def test_an_unknown_key_of_a_file_names_the_nearest(tmp_path):
    path = tmp_path / "typo.py"
    path.write_text(
        "from grpo_jax.config import defaults\n\ndef get_config():\n    config = defaults()\n"
        "    config.algorithm.grop_size = 8\n    return config\n"
    )
    assert refusal(path) == "algorithm.grop_size=8: there is no such key (did you mean algorithm.group_size?)"


def test_references_between_keys_are_kept(tmp_path):
    path = tmp_path / "reference.py"
    path.write_text(
        "from grpo_jax.config import defaults\n\ndef get_config():\n    config = defaults()\n"
        "    config.model.path = 'random'\n    config.arithmetic.update(num_train=10, num_val=1)\n"
        "    config.data.max_prompt_length = config.data.get_ref('max_response_length')\n    return config\n"
    )
    data = parse(path, "--config.data.max_response_length=77").data
    assert (data.max_prompt_length, data.max_response_length) == (77, 77)


def test_load_config_wants_a_config_dict(tmp_path):
    path = tmp_path / "plain.py"
    path.write_text("def get_config():\n    return {}\n")
    with pytest.raises(ConfigError, match=r"must return an ml_collections\.ConfigDict"):
        load_config(path)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("data.train_batch_size=4", "data.train_batch_size='4': write --config.data.train_batch_size=4"),
        ("--data.train_batch_size=4", "--data.train_batch_size='4': write --config.data.train_batch_size=4"),
        (
            "actor_rollout_ref.model.path=/m",
            "actor_rollout_ref.model.path='/m': write --config.model.path=/m",
        ),
        ("+trainer.seed=1", "+trainer.seed='1': write --config.trainer.seed=1"),
        ("++data.shuffle=False", "++data.shuffle='False': write --config.data.shuffle=False"),
        (
            "+trainer.foo=1",
            "command line='+trainer.foo': is neither a flag nor the value of one; keys are set as "
            "--config.SECTION.KEY=VALUE",
        ),
    ],
)
def test_overrides_as_verl_has_them(file, argument, message):
    assert refusal(file, argument) == message


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("rollout.n", "algorithm.group_size"),
        ("actor_rollout_ref.rollout.n", "algorithm.group_size"),
        ("--actor_rollout_ref.rollout.n", "algorithm.group_size"),
        ("--config.rollout.n", "algorithm.group_size"),
        ("optim.lr", "optim.learning_rate"),
        ("--config.optim.lr", "optim.learning_rate"),
        ("actor.optim.lr", "optim.learning_rate"),
        ("actor_rollout_ref.actor.optim.lr", "optim.learning_rate"),
        ("trainer.total_training_steps", "trainer.num_steps"),
        ("--config.trainer.save_freq", "checkpoint.every_steps"),
        ("trainer.test_freq", "eval.every_steps"),
        ("trainer.logger", "logging.loggers"),
        ("trainer.project_name", "logging.project_name"),
        ("algorithm.num_generations", "algorithm.group_size"),
        ("--num_generations", "algorithm.group_size"),
        ("--beta", "algorithm.kl_coef"),
        ("--config.algorithm.beta", "algorithm.kl_coef"),
        ("kl_loss_coef", "algorithm.kl_coef"),
        ("--config.algorithm.kl_loss_coef", "algorithm.kl_coef"),
        ("data.truncation", "data.overlong_prompts"),
    ],
)
def test_names_of_verl_and_trl_lead_to_our_key(file, name, key):
    assert refusal(file, f"{name}=1") == (
        f"{name.removeprefix('--config.')}='1': is a name of verl or TRL: here it is --config.{key}"
    )


def test_old_names_are_none_of_ours_and_their_keys_are():
    assert {*VERL.values(), *TRL.values()} <= KEYS.keys()
    assert not VERL.keys() & KEYS.keys()
    last = {name.rpartition(".")[2] for name in KEYS}
    assert not TRL.keys() & last


@pytest.mark.parametrize("table", ["from_verl", "from_trl"])
def test_old_names_are_those_of_the_docs(table):
    """Each stands on the page, in a row that names its key too."""
    page = ROOT / "docs" / f"{table}.md"
    rows = [line for line in page.read_text().splitlines() if line.startswith("|")]
    for old, key in (VERL if table == "from_verl" else TRL).items():
        own, named = old.rpartition(".")[2], key.rpartition(".")[2]
        section = f"{key.partition('.')[0]}.*"
        assert any(own in row and (named in row or section in row) for row in rows), (old, key)


def test_a_tuple_without_quotes():
    path = ROOT / "configs" / "gsm8k.py"
    written = "\"--config.data.train_files=('a.parquet',)\""
    assert refusal(path, "--config.data.train_files=[a.parquet]") == (
        f"data.train_files='[a.parquet]': a tuple is written with quotes, as {written}"
    )
    assert "=('a', 'b')\"" in refusal(path, "--config.data.val_files=(a,b)")
    for value in ("['a', 'b']", "('a', 'b')"):
        config = parse(path, "--config.model.path=x", f"--config.data.train_files={value}")
        assert config.data.train_files == ("a", "b")
