"""docs/scaling.md is what docs/scaling_tables.py makes of the plan."""

import pathlib
import sys

import pytest

DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs"


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    import scaling_tables

    yield scaling_tables
    del sys.modules["scaling_tables"]


@pytest.mark.slow
def test_the_page_is_what_the_plan_counts(tables):
    page = tables.PAGE.read_text()
    assert tables.with_tables(page) == page, "run: python docs/scaling_tables.py"


def test_what_is_held_by_hand(tables):
    """14 bytes for each of 7,615,616,512 parameters on 8 devices: 13.3 GB; biases and norms are whole on each."""
    model = tables.MODELS["7B"]
    _, mesh, plan = tables.layout(model, 8, 80e9)
    assert mesh == {"data": 1, "fsdp": 8, "tensor": 1}
    assert sum(plan.held.values()) == pytest.approx(14 * 7_615_616_512 / 8, rel=1e-3)


def test_a_model_that_fits_no_host_is_split_over_several(tables):
    """70B holds 14 x 70.6 GB / 8 = 123 GB of each of 8; of 64, an eighth of that."""
    model = tables.MODELS["70B"]
    assert tables.layout(model, 64, 79.5e9)[1]["fsdp"] == 64
    assert tables.row("70B", "h100", 8)[-1] == "memory, in update"


def test_sums_over_data_go_through_the_network(tables):
    """An update sends 2 bytes x 2 x parameters / 8 x (1 - 1 / 8) a micro-batch to other hosts, at 40 GB/s."""
    model, config = tables.MODELS["7B"], tables.recipe(4)
    of = lambda data: tables.trainer_seconds(config, model, dict(data=data, fsdp=8, tensor=1), "h100")
    micro = tables.speed.find_shapes(config, 64, tables.WORK).num_micro
    sent = micro * 2 * 2 * 7_615_616_512 / 8 * (1 - 1 / 8)
    inside = tables.speed.expected_seconds(
        config, model, dict(data=8, fsdp=8, tensor=1), tables.CARDS["h100"], tables.WORK
    )
    assert of(8)["update_actor"] - inside["update_actor"] == pytest.approx(
        sent * (1 / 40e9 - 1 / 130e9), rel=1e-3
    )
