"""The metrics of a step that do not depend on what was sampled alone."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny_models import tiny_config

from grpo_jax.run import metrics


def test_mfu_counts_every_pass_over_the_batch(monkeypatch):
    monkeypatch.setattr(metrics, "PEAK_FLOPS", {jax.devices()[0].device_kind: 1e9})
    config = tiny_config(num_layers=1)  # width 16, MLP 24, 4 heads of 4 with 2 for keys, 64 tokens
    lengths, timings = np.array([10, 20]), {"timing_s/step": 8.0, "timing_s/update_actor": 0.5}
    # Attention 16 x (2 x 16 + 2 x 8), MLP 16 x 3 x 24, head 64 x 16: 2,944 weights, 6 FLOP each for 30 tokens;
    # and 3 x 2 x 16 for each of the 10^2 + 20^2 pairs of tokens.
    one_pass = 6 * 2_944 * 30 + 96 * 500
    of_one, of_three = (
        metrics.performance_metrics(config, lengths, timings, num_devices=2, num_passes=passes)
        for passes in (1, 3)
    )
    assert of_one["perf/mfu/actor"] == pytest.approx(one_pass / 0.5 / 2 / 1e9)
    assert of_three["perf/mfu/actor"] == pytest.approx(3 * one_pass / 0.5 / 2 / 1e9)
    # A step has its tokens once, however often they are trained on.
    assert of_one["perf/throughput"] == of_three["perf/throughput"] == 30 / 8 / 2


def test_flops_are_those_that_results_depend_on():
    model, lengths = tiny_config(num_layers=2), np.array([10, 4])
    of = lambda **changes: metrics.update_flops(dataclasses.replace(model, **changes), lengths)
    # A window of 6: of the 10 x 10 / 2 pairs of the first sequence, 4 x 4 / 2 are out of sight. Two products of 2
    # FLOPs, 16 channels, forward and twice backward.
    assert of() - of(windows=(0, 6)) == 3 * 2 * 2 * 16 * (4 * 4 / 2)
    # 2 of 6 experts, and the router's products: 14 tokens, 6 FLOPs for each number.
    assert of(num_experts=6, experts_per_token=2) - of() == 14 * 6 * 2 * (3 * 16 * 24 + 16 * 6)
