"""What prompts, models and rewards say never acts on a terminal, wherever a run shows it."""

import logging

import pytest
from config_helpers import gsm8k
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from grpo_jax.config.text import printable, visible
from grpo_jax.rewards import make_reward
from grpo_jax.rollout.base import one_line
from grpo_jax.run.alarm_log import example
from grpo_jax.run.workdir import Workdir, start_logging
from grpo_jax.run.writer import MetricsWriter
from grpo_jax.types import Completion, Prompt, RolloutGroup, ScoredBatch

RAW = "\x1b[31mred\x1b[0m \u202eleft \x9b2J\r\x07\u200b"
SHOWN = "␛[31mred␛[0m ⟨U+202E⟩left ⟨U+009B⟩2J␍␇⟨U+200B⟩"


@pytest.fixture
def log(tmp_path, capsys):
    """Logs a message as a run does; returns what console and file have of it."""

    def write(message):
        logger = logging.getLogger("grpo_jax")
        before = logger.level, logger.propagate, logging.raiseExceptions
        start_logging(tmp_path / "train.log")
        try:
            logger.warning(message)
        finally:
            for handler in list(logger.handlers):
                logger.removeHandler(handler)
                handler.close()
            logger.level, logger.propagate, logging.raiseExceptions = before
        return capsys.readouterr().out, (tmp_path / "train.log").read_text()

    return write


def test_signs_stand_for_hidden_characters():
    assert printable(f"{RAW}\n漢é😀") == f"{SHOWN}\n漢é😀"
    assert visible("a\tb\nc") == "a␉b⏎\nc"


def test_console_and_log(log):
    console, file = log(f"a\n{RAW}")
    assert console == f"a\n{SHOWN}\n"
    assert file.endswith(f" WARNING a\n{SHOWN}\n")


def test_the_example_of_an_alarm():
    reward = make_reward(gsm8k().reward, max_response_length=8)
    prompt = Prompt("train/0", (1,), f"Q{RAW}", f"5{RAW}", "test", {})
    group = RolloutGroup(prompt, (Completion((1,), (0.0,), f"one\n{RAW}.", "stop", 0),))
    shown = example(ScoredBatch([group], reward.score([group])), reward)
    assert f"prompt:       Q{SHOWN}\n" in shown and f"ground truth: 5{SHOWN}\n" in shown
    assert f"completion:   one\n{SHOWN}.\n" in shown
    assert printable(shown) == shown


def test_one_line():
    assert one_line(f"a\n b{RAW}") == f"a b{SHOWN.replace('␍', ' ')}"
    assert one_line("") == "(empty)" and one_line("\n\n \t") == "(only 4 characters of white space)"


def test_tensorboard(tmp_path):
    writer = MetricsWriter(Workdir(tmp_path), gsm8k(), resume_step=None)
    writer.write_text("rollouts", [f"a\n{RAW}"], step=1)
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (text,) = events.Tensors("rollouts/text_summary")
    assert text.tensor_proto.string_val[0].decode() == f"    a\n    {SHOWN}"
