"""metrics.jsonl: a line a step, on disk when it is written, and none twice."""

import json
import os
import subprocess
import sys

from grpo_jax.rollout.evaluation import read_jsonl, write_jsonl
from grpo_jax.run.writer import drop_after

KILLED = """
import os, pathlib, signal, sys
from grpo_jax.config import Config, LoggingSection
from grpo_jax.run.workdir import Workdir
from grpo_jax.run.writer import MetricsWriter
config = Config(logging=LoggingSection(loggers=()))
writer = MetricsWriter(Workdir(pathlib.Path(sys.argv[1])), config, resume_step=0)
writer.write({"reward/mean": float("nan")}, step=1, epoch=1)
synced = []
os.fsync = lambda descriptor: synced.append(os.fstat(descriptor).st_size)
writer.write({"reward/mean": 0.5}, step=2, epoch=1)
print(synced == [pathlib.Path(sys.argv[1], "metrics.jsonl").stat().st_size], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_line_is_on_disk_when_it_is_written(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, tmp_path], capture_output=True, env=os.environ)
    assert done.stdout == b"True\n", done.stderr
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["reward/mean"]) for line in lines] == [(1, None), (2, 0.5)]


def test_later_lines_and_torn_ones_are_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1}\n{"step": 2}\n[3]\n{"step": "4"}\n\xff\x00\n{"step": 3}\n{"step": 2, "ti')
    drop_after(file, 2)
    assert file.read_text() == '{"step": 1}\n{"step": 2}\n'
    drop_after(file, -1)
    assert file.read_text() == ""
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_record_is_one_line_to_every_reader(tmp_path):
    """JSON leaves some of Unicode's line ends as they are, and models write them."""
    records = [{"completion": "a\x85b\u2028c\u2029d\x0be\x1cf\rg\nh 漢"}, {"completion": ""}]
    write_jsonl(tmp_path / "records.jsonl", records)
    text = (tmp_path / "records.jsonl").read_text()
    assert [json.loads(line) for line in text.splitlines()] == records
    assert "漢" in text
    # As older versions wrote them, whose runs go on.
    (tmp_path / "old.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    assert len((tmp_path / "old.jsonl").read_text().splitlines()) > len(records)
    assert read_jsonl(tmp_path / "old.jsonl") == read_jsonl(tmp_path / "records.jsonl") == records
