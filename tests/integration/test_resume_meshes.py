"""A run of eight devices goes on with fewer of them, or along other axes, to the same numbers up to rounding."""

import shutil

import integration_helpers as helpers
import numpy as np
import pytest

MESH = {"mesh.data": 1, "mesh.fsdp": 4, "mesh.tensor": 2}
OTHERS = {
    "one device": {"mesh.data": 1, "mesh.fsdp": 1, "mesh.tensor": 1},
    "two devices": {"mesh.data": 1, "mesh.fsdp": 2, "mesh.tensor": 1},
    "other axes": {"mesh.data": 4, "mesh.fsdp": 1, "mesh.tensor": 2},
}


@pytest.fixture(scope="module")
def overrides(whole_run_overrides):
    """Two epochs of three steps, of which the fourth is saved, with a reference that was refreshed then."""
    changes = {"algorithm.ref_refresh_every": 2, "optim.learning_rate": 1e-3, "eval.before_training": False}
    return whole_run_overrides | changes


@pytest.fixture(scope="module")
def on_eight(tmp_path_factory, overrides):
    workdir = tmp_path_factory.mktemp("meshes") / "run"
    out = helpers.train_ok(workdir, overrides | MESH)
    assert "8 x cpu" in out
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_it_goes_on_with_the_same_numbers(name, on_eight, overrides, tmp_path):
    workdir = shutil.copytree(on_eight, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / "6")
    refused = helpers.run_train(workdir, overrides | OTHERS[name])
    assert refused.code == 2 and refused.err.startswith("error: mesh.") and "resume=force" in refused.err
    out = helpers.train_ok(workdir, overrides | OTHERS[name] | {"checkpoint.resume": "force"})
    assert "Going on after step 4 of 6." in out
    for step in (5, 6):
        file = f"rollouts/step-{step:06d}.jsonl"
        texts = [[r["completion"] for r in helpers.read_jsonl(d / file)] for d in (workdir, on_eight)]
        assert texts[0] == texts[1]
    assert_same_metrics(helpers.read_lines(workdir), helpers.read_lines(on_eight))
    (arrays, progress), (expected, expected_progress) = (
        helpers.read_checkpoint(folder, 6) for folder in (workdir, on_eight)
    )
    assert progress == expected_progress and arrays.keys() == expected.keys()
    before = helpers.read_checkpoint(workdir, 4)[0]
    for key in arrays:
        np.testing.assert_allclose(numbers(arrays[key]), numbers(expected[key]), atol=1e-6, rtol=1e-4)
    embedding = "params['embedding']"  # far from where it was: four updates of a thousandth each
    assert np.abs(numbers(arrays[embedding]) - numbers(before[embedding])).max() > 1e-3


def numbers(array):
    dtype, shape, content = array
    return np.frombuffer(content, dtype).reshape(shape)


def assert_same_metrics(lines, expected):
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[:4] == expected[:4]
    for line, other in zip(lines[4:], expected[4:], strict=True):
        line, other = helpers.without_clock(line), helpers.without_clock(other)
        assert line == pytest.approx(other, rel=1e-3, abs=1e-6)
