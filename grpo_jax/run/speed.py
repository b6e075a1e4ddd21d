"""The seconds that a step should take on a card, phase by phase, and what it took beside them.

The trainer's phases are predicted by `learner.speed`, sampling and the push of weights by the engine, rewards by
nobody. What is measured is that of `timing_s/...`.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from grpo_jax import rollout
from grpo_jax.config import Config
from grpo_jax.learner import speed
from grpo_jax.model.cards import CARDS
from grpo_jax.model.config import ModelConfig
from grpo_jax.types import Metrics, Workload

PHASES = ("gen", "old_log_prob", "ref", "update_actor", "update_weights")
"""In the order of a step."""
WARM_UP = 2
"""Steps of a process that hold compilation and first times."""
SLOW = 1.3
"""Times what is expected, from which on a phase is pointed at."""
SHORT_S = 0.01
"""Seconds below which nothing is pointed at: what a host needs to start anything, which nobody predicts."""


@dataclasses.dataclass(frozen=True)
class Speed:
    """What a run's steps should take."""

    config: Config
    model: ModelConfig
    mesh: Any
    """A `Mesh`, or an `AbstractMesh` for devices that are not here."""
    card: str
    """A name of `CARDS`; "" for a device whose rates are not known: then nothing is expected."""

    @property
    def why_unknown(self) -> str:
        """Why nothing is expected of any phase; "": something is."""
        if not self.card:
            return "the rates of this device are not known"
        if not CARDS[self.card].matmul:
            return f"the rates of a {self.card} are not known"
        if jnp.dtype(self.model.dtype).itemsize != 2:
            return f"they are known for bfloat16 and float16, and not for model.dtype={self.model.dtype}"
        return ""

    def expected(self, work: Workload) -> dict[str, float]:
        """Phase -> seconds, as far as they are predicted, in the order of a step."""
        if self.why_unknown:
            return {}
        card, section = CARDS[self.card], self.config.rollout
        seconds = rollout.expected_seconds(section, self.model, card, work, self.mesh.size)
        if self.config.algorithm.dynamic_sampling_rounds:  # nobody knows how many batches that will be
            seconds.pop("gen", None)
        seconds |= speed.expected_seconds(self.config, self.model, dict(self.mesh.shape), card, work)
        return {phase: seconds[phase] for phase in PHASES if phase in seconds}

    def planned_work(self) -> Workload:
        """A step whose prompts and completions are all as long as they may be."""
        data, group_size = self.config.data, self.config.algorithm.group_size
        return Workload(data.train_batch_size, group_size, data.max_prompt_length, data.max_response_length)

    def as_metrics(self, metrics: Metrics) -> Metrics:
        """ "expected_s/PHASE" -> seconds, for the lengths that the completions of a step had; {} where unknown."""
        return {f"expected_s/{phase}": s for phase, s in self._expected_of([metrics]).items()}

    def _expected_of(self, lines: Sequence[Metrics]) -> dict[str, float]:
        """As `expected`, for the median lengths of some steps."""
        work = dataclasses.replace(
            self.planned_work(),
            prompt_tokens=_median(lines, "prompt_length/mean"),
            response_tokens=_median(lines, "response_length/mean"),
        )
        return self.expected(work)

    def compared(self, lines: Sequence[Metrics]) -> list[str]:
        """Expected and measured seconds as a table, for the lengths that the completions had; [] where unknown.

        Args: lines: metrics of steps after the warm-up. Medians are taken.
        """
        if not lines:
            return []
        expected = self._expected_of(lines)
        if not expected:
            return []
        pairs = {phase: (s, _median(lines, f"timing_s/{phase}")) for phase, s in expected.items()}
        origin = "" if CARDS[self.card].is_measured else ", by its data sheet"
        return [
            f"Seconds of a step, expected of {self.mesh.size} x {self.card}{origin} / measured "
            '(docs/performance.md, "Is my speed normal?"):',
            *(_row(phase, *pair) for phase, pair in pairs.items()),
        ]


def _median(lines: Sequence[Metrics], name: str) -> float:
    return statistics.median(line.get(name, 0.0) for line in lines)


def _row(phase: str, expected: float, measured: float) -> str:
    slow = (
        f"   {measured / expected:.1f} times as long" if measured > SLOW * expected > SLOW * SHORT_S else ""
    )
    return f"  {phase:<16}{expected:>9.3g} / {measured:.3g}{slow}"


def steady(lines: Sequence[dict[str, Any]], first_step: int) -> list[dict[str, Any]]:
    """The steps after the warm-up of a process that began after step `first_step`."""
    return [line for line in lines if "timing_s/step" in line and line["step"] > first_step + WARM_UP]
