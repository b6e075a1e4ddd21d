"""TensorBoard's own reader sees each point once; a full disk costs points, and nothing else."""

import logging
import resource

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c

from grpo_jax.run.tensorboard import HPARAMS_METRICS, TensorBoard, cut_after


def points(folder):
    """(step, value) of "reward/mean" as every reader of event files sees them, none left out."""
    found = []
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:  # a TFRecord: length, its checksum, the event, its checksum
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            assert data[8:12] == masked_crc32c(data[:8]).to_bytes(4, "little")
            checksum, data = data[12 + size : 16 + size], data[16 + size :]
            assert checksum == masked_crc32c(event.SerializeToString()).to_bytes(4, "little")
            found += [(event.step, value.simple_value) for value in event.summary.value]
    return found


def shown(folder):
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars("reward/mean")]


@pytest.fixture
def messages():
    """Warnings of the module."""
    logger, found = logging.getLogger("grpo_jax.run.tensorboard"), []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logger.addHandler(handler)
    yield found
    logger.removeHandler(handler)


@pytest.fixture
def limit():
    """Sets the size that no file of this process can grow beyond, bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write(board, steps):
    for step in steps:
        board.write({"reward/mean": step / 8, "kl/mean": None}, step)


def test_a_resumed_run_doubles_no_point(tmp_path):
    folder = tmp_path / "tensorboard"
    for last_step, steps in ((-1, (0, 1, 2, 3)), (2, (3, 4, 5)), (1, (2, 3))):
        board = TensorBoard(folder, last_step=last_step)
        write(board, steps)
        board.close()
    assert len(list(folder.iterdir())) == 3
    expected = [(step, step / 8) for step in (0, 1, 2, 3)]
    assert points(folder) == expected
    TensorBoard(folder, last_step=-1)  # no checkpoint was left
    assert points(folder) == []


def test_tensorboards_reader_agrees(tmp_path):
    board = TensorBoard(tmp_path, last_step=-1)
    write(board, (1, 2))
    board.close()
    assert shown(tmp_path) == [(1, 0.125), (2, 0.25)]


def test_histograms_and_settings_are_read_by_tensorboard(tmp_path):
    settings = {"optim.learning_rate": 1e-4, "algorithm.policy_loss": "gspo", "optim.offload": True}
    board = TensorBoard(tmp_path, last_step=-1, settings=settings)
    assert list(tmp_path.iterdir()) == []  # a start without a step leaves nothing
    board.write_histograms(
        {"distribution/reward": np.array([[0, 1], [1, np.nan]]), "none": np.array([np.inf])}, 1
    )
    board.close()
    accumulator = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0})
    accumulator.Reload()
    assert accumulator.Tags()["histograms"] == ["distribution/reward"]
    (event,) = accumulator.Histograms("distribution/reward")
    value = event.histogram_value
    assert (event.step, value.num, value.sum, value.min, value.max) == (1, 3, 2, 0, 1)
    counts = dict(zip(value.bucket_limit, value.bucket, strict=True))
    assert sum(counts.values()) == 3 and counts[max(counts)] == 2
    content = accumulator.PluginTagToContent("hparams")
    start = HParamsPluginData.FromString(content["_hparams_/session_start_info"]).session_start_info.hparams
    assert start["optim.learning_rate"].number_value == 1e-4 and start["optim.offload"].bool_value
    assert start["algorithm.policy_loss"].string_value == "gspo"
    experiment = HParamsPluginData.FromString(content["_hparams_/experiment"]).experiment
    assert {info.name.tag for info in experiment.metric_infos} == set(HPARAMS_METRICS)


def test_files_of_older_versions_are_cut_too(tmp_path):
    with SummaryWriter(str(tmp_path), purge_step=0) as writer:
        for step in range(4):
            writer.add_scalar("reward/mean", step / 8, step)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-3])  # killed while it wrote step 3
    cut_after(file, 9)
    assert points(tmp_path) == [(0, 0.0), (1, 0.125), (2, 0.25)]
    cut_after(file, 1)
    assert points(tmp_path) == [(0, 0.0), (1, 0.125)]
    before = file.read_bytes()
    cut_after(file, 1)
    assert file.read_bytes() == before


def test_a_full_disk_costs_points_and_one_warning(tmp_path, messages, limit):
    folder = tmp_path / "tensorboard"
    board = TensorBoard(folder, last_step=-1)
    write(board, [1])
    (file,) = folder.iterdir()
    limit(file.stat().st_size + 10)  # half a record
    write(board, [2, 3])
    assert len(messages) == 1 and "TensorBoard lacks points, training goes on" in messages[0]
    limit(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    write(board, [4])
    board.close()
    assert points(folder) == [(1, 0.125), (4, 0.5)] and len(messages) == 1


def test_a_folder_that_cannot_be_written_to_does_not_end_a_run(tmp_path, messages):
    (tmp_path / "tensorboard").write_text("a file")
    board = TensorBoard(tmp_path / "tensorboard", last_step=-1)
    write(board, [1])
    board.write_text("rollouts", "text", 1)
    board.close()
    assert len(messages) == 1


def test_no_space_from_the_first_byte_on(tmp_path, messages, limit):
    board = TensorBoard(tmp_path / "tensorboard", last_step=-1)
    limit(5)
    write(board, [1, 2])
    limit(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    write(board, [3])
    board.close()
    assert points(tmp_path / "tensorboard") == [(3, 0.375)] and len(messages) == 1
