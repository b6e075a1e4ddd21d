"""Ctrl-C and SIGTERM before a run begins: one line, exit code 130."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def start(config, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "grpo_jax.train", f"--config={config}"],
        cwd=config.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )  # fmt: skip


def wait_for(is_there, seconds=60):
    end = time.monotonic() + seconds
    while not is_there():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_while_modules_are_imported(tmp_path, number):
    """A jax that takes a minute to import stands in for a cold disk."""
    (tmp_path / "jax").mkdir()
    marker = tmp_path / "importing"
    slow = f"import pathlib, time\npathlib.Path({str(marker)!r}).touch()\ntime.sleep(60)\n"
    (tmp_path / "jax" / "__init__.py").write_text(slow)
    config = tmp_path / "config.py"
    config.write_text("")
    process = start(config, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    wait_for(marker.exists)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, "", "Interrupted before anything was done.\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_while_inputs_are_read(tmp_path, number):
    marker = tmp_path / "reading"
    config = tmp_path / "config.py"
    slow = f"    import pathlib, time\n    pathlib.Path({str(marker)!r}).touch()\n    time.sleep(60)\n"
    config.write_text("def get_config():\n" + slow)
    process = start(config)
    wait_for(marker.exists)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, "", "Interrupted.\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_while_a_string_is_executed(tmp_path, number):
    """As where a dataclass is made. Python would end by SIGINT, which shells call 130 and nobody else does."""
    marker = tmp_path / "reading"
    config = tmp_path / "config.py"
    slow = f"import pathlib, time; pathlib.Path({str(marker)!r}).touch(); time.sleep(60)"
    config.write_text(f"def get_config():\n    exec({slow!r})\n")
    process = start(config)
    wait_for(marker.exists)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, "", "Interrupted.\n")


@pytest.mark.parametrize("end", ["atexit.register(late)", "Late.__del__ = Late.__call__"])
@pytest.mark.parametrize(
    ("number", "rule"), [(signal.SIGTERM, ""), (signal.SIGINT, "raise ConfigError('a', 1, 'is bad')")]
)
def test_while_python_ends(tmp_path, number, rule, end):
    """A command that has done all, or said what is wrong, has that exit code, whatever comes then.

    At exit functions have their turn, and after that, without any handlers of signals, what modules hold.
    """
    marker = tmp_path / "ending"
    code = f"""
import atexit, pathlib, time
from grpo_jax.config.command_line import one_line_errors
from grpo_jax.config import ConfigError

class Late:
    def __call__(self, touch=pathlib.Path({str(marker)!r}).touch, sleep=time.sleep):
        touch()
        sleep(0.5)

late = Late()
{end}
with one_line_errors():
    print("done")
    {rule}
"""
    # Who starts a module of the package has its handlers.
    begin = "import sys, importlib.machinery as machinery\n"
    begin += "sys.modules['__main__'].__spec__ = machinery.ModuleSpec('grpo_jax.x', None)\n"
    process = subprocess.Popen(
        [sys.executable, "-c", begin + code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    wait_for(marker.exists)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    expected = (2, "done\n", "error: a=1: is bad\n") if rule else (0, "done\n", "")
    assert (process.returncode, out, err) == expected


def test_output_that_nobody_reads_hides_no_exit_code(tmp_path):
    code = (
        "from grpo_jax.config.command_line import one_line_errors\nfrom grpo_jax.config import ConfigError\n"
    )
    code += "with one_line_errors():\n    print('x')\n    raise ConfigError('a', 1, 'is bad')"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
    )  # fmt: skip
    os.close(writer)
    assert "error: a=1: is bad\n" in done.stderr and "Traceback" not in done.stderr


def test_handlers_of_others_stay():
    """Importing the module, as a notebook would, changes nothing."""
    code = "import signal; old = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)\n"
    code += "import grpo_jax.config.command_line\n"
    code += "assert old == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))"
    subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)


DROPS = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import tiny_config

class Dropped:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        sum(range(1000))  # here the exception comes, and Python drops it

def get_config():
    Dropped()
    return tiny_config.get_config()
"""


@pytest.mark.slow
def test_a_signal_that_python_drops_stops_the_run_before_its_first_step(tmp_path):
    """A KeyboardInterrupt within a `__del__` is printed, and goes nowhere."""
    config = tmp_path / "config.py"
    config.write_text(DROPS.format(tests=str(ROOT / "tests" / "integration")))
    process = start(config)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130 and "Traceback" not in out + err, err
    assert "Interrupted in phase " in out and "Step 1/" not in out
