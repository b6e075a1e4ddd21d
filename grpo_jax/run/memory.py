"""What a run needs of a device's memory beside what there is, and the settings that would make it fit.

The figures are `learner.memory`'s plan. A `Budget` holds it against a device three times: before anything is made
(`check_plan`), when the programs are compiled (`check_compiled`), and after a failure (`explain`).
"""

import dataclasses
import functools
import logging
import os
import re
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from grpo_jax.config import Config, ConfigError, parse_config
from grpo_jax.learner.memory import MemoryPlan, abstract_mesh, plan_memory
from grpo_jax.learner.packing import micro_batch_shape
from grpo_jax.model.config import ModelConfig
from grpo_jax.model.sharding import num_batch_shards
from grpo_jax.rollout import memory_savers, push_bytes, sampling_bytes, trainer_share
from grpo_jax.storage.files import size_text
from grpo_jax.weight_sync import cuda

logger = logging.getLogger(__name__)

TOLERANCE = 0.1
"""How far a plan may be off: a peak above what there is by so much gets a warning, by more it is refused."""
JAX_SHARE = 0.75
"""Of a GPU's memory: what JAX takes where nothing else is said."""
MOST_ADVICE = 3
"""Settings that are named where each of them is enough."""
LEAST_GAIN = 0.001
"""Of the device: a setting that gives back less is not named, unless it is enough."""
FEW_LOGITS = 512
"""`actor.logits_chunk_tokens` below which the output head becomes slow."""
VISIBLE = 5e7
"""Bytes that are not 0.0 GB."""
PLANNED = {
    "gen": ("sampling",),
    "update_actor": ("update", "optimizer"),
    "old_log_prob": ("score",),
    "ref": ("score",),
    "update_weights": ("weight sync",),
}
"""Phase of the timers -> phases of the plan. In others, the plan knows what is held."""
UNITS = {"bytes": 1.0, "B": 1.0, "K": 2.0**10, "M": 2.0**20, "G": 2.0**30, "T": 2.0**40}

Changes = dict[str, Any]
"""Key -> new value."""


class DoesNotFit(MemoryError):
    """A phase needs more than a device has; the message says what, and what would help."""


def plan_run(config: Config, model: ModelConfig, mesh: Mesh | AbstractMesh) -> MemoryPlan:
    """The memory of a run, what its engine's weights take on the way included."""
    pushed, sampling = push_bytes(config.rollout), sampling_bytes(config, model, mesh)
    return plan_memory(config, model, mesh, push_bytes=pushed, sampling=sampling)


def device_stats() -> dict[str, int]:
    """What JAX says of the first device's memory, bytes by name; {} where it does not say any."""
    return jax.local_devices()[0].memory_stats() or {}


def memory_limit() -> int | None:
    """Bytes that a device gives to JAX; None where it does not say so."""
    limit = device_stats().get("bytes_limit")
    if limit == 0:  # of CUDA's own allocator, which `rollout.sleep` takes, JAX does not know it
        share = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", JAX_SHARE))
        limit = int(share * cuda.device_bytes(jax.local_devices()[0].local_hardware_id))
    return limit


@dataclasses.dataclass(frozen=True)
class Budget:
    """A run's needs and a device's memory."""

    config: Config
    model: ModelConfig
    mesh: Any
    """A `Mesh`, or an `AbstractMesh` for devices that are not here."""
    limit: float | None
    """Bytes of each device for the trainer; None where it does not say so: then nothing is checked."""

    @functools.cached_property
    def plan(self) -> MemoryPlan:
        return plan_run(self.config, self.model, self.mesh)

    # ---- the three times ----

    def check_plan(self) -> None:
        """Checks the plan, before anything is made.

        Raises: ConfigError: it cannot fit.
        """
        plan = self.plan
        if self.limit is None or plan.peak <= self.limit:
            return
        text = f"{_needs(plan.fullest, plan.peak, self.limit)}: {_listed(plan.parts(plan.fullest))}. "
        text += self.advice(plan.fullest)
        if plan.peak > (1 + TOLERANCE) * self.limit:  # always so where what is held alone is too much
            raise ConfigError("model.path", self.config.model.path, f"does not fit: {text}")
        logger.warning("Memory may be short: %s", text)

    def check_compiled(self, sizes: dict[str, int]) -> None:
        """Checks what `Learner.compile` says.

        Args:   sizes: phase -> bytes on one device.
        Raises: DoesNotFit: a phase needs more than there is.
        """
        for phase, size in sizes.items():
            if self.limit and size > self.limit:
                counted = (
                    f"the plan counted {size_text(self.plan.need(phase))}: {_listed(self.plan.parts(phase))}"
                )
                advice = self.advice(phase, size / self.plan.need(phase))
                raise DoesNotFit(
                    f"{_needs(phase, size, self.limit)}, as the compiler says; {counted}. {advice}"
                )

    def explain(self, error: BaseException, timed_phase: str) -> str | None:
        """What a person needs to know about an error; None where it is not one of memory, or says it already.

        Args: timed_phase: that of the run's timers in which it came.
        """
        if isinstance(error, DoesNotFit):
            return None
        is_xla = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
        if isinstance(error, MemoryError) or (is_xla and "host memory" in str(error).lower()):
            held = _listed(self.plan.host) if self.plan.host else "nothing"
            where = "optim.offload and algorithm.ref_offload put it there; mesh.fsdp splits it over devices"
            return f"the host has no memory left; of the run's arrays it holds {held}. {where}"
        return self._explain_device(str(error), timed_phase) if is_xla and self.limit else None

    def _explain_device(self, message: str, timed_phase: str) -> str:
        assert self.limit
        plan, asked = self.plan, asked_bytes(message)
        phase = max(PLANNED.get(timed_phase, (timed_phase,)), key=plan.need)
        wanted = f"JAX asked for {size_text(asked)} more" if asked else "JAX asked for more"
        full = f"a device's memory is full: {wanted}, with {size_text(self.limit)} in all"
        if phase not in plan.beside:
            ways = [self._described(way, phase, 1.0) for way in self.ways(phase)][:MOST_ADVICE]
            return (
                f"{full}. What is held from step to step is {size_text(plan.need(phase))}: {_listed(plan.held)}. "
                f"Of it, memory is given back by {', '.join(ways) or 'no setting'}; "
                "docs/troubleshooting.md has more"
            )
        free = self.limit - device_stats().get("bytes_in_use", self.limit - asked)
        # It did not fit, whatever was counted.
        needed = max(plan.need(phase), self.limit + max(asked - free, 0.02 * self.limit))
        return (
            f"{full}. The plan counts {size_text(plan.need(phase))} for {phase}: {_listed(plan.parts(phase))}. "
            f"{self.advice(phase, needed / plan.need(phase))}"
        )

    # ---- advice ----

    def advice(self, phase: str, factor: float = 1.0) -> str:
        """Which settings would make a phase fit, with the memory that each gives back.

        Args: phase: of the plan; factor: what it really takes, in multiples of its plan.
        """
        alone = [way for way in self.ways(phase, factor) if self.after(way).fits(phase, factor)]
        if alone:
            ways = [self._described(way, phase, factor) for way in alone[:MOST_ADVICE]]
            return f"It fits with {' or with '.join(ways)}."
        together, fits = self._combined(phase, factor)
        if not together:
            return "No setting takes less."
        text = self._described(together, phase, factor)
        if fits:
            return f"It fits with all of {text}."
        return f"Even with {text} it does not: take more devices or a smaller model."

    def after(self, changes: Changes) -> "Budget":
        """The same run with other settings, on devices of the same kind."""
        config = _changed(self.config, changes)
        sizes = dict(self.mesh.shape) | {"fsdp": changes.get("mesh.fsdp", self.mesh.shape["fsdp"])}
        share = trainer_share(config.rollout) / trainer_share(self.config.rollout)
        model = self.model
        if "model.remat" in changes:
            model = dataclasses.replace(model, remat=config.model.remat)
        return Budget(config, model, abstract_mesh(**sizes), self.limit and self.limit * share)

    def excess(self, phase: str, factor: float) -> float:
        """Bytes that a phase needs beyond those that there are. Args: as `advice`."""
        assert self.limit is not None
        return factor * self.plan.need(phase) - self.limit

    def fits(self, phase: str, factor: float) -> bool:
        """Whether every phase fits. Args: as `advice`."""
        return self.excess(phase, factor) <= 0 and self.excess(self.plan.fullest, 1.0) <= 0

    def ways(self, phase: str, factor: float = 1.0) -> Iterator[Changes]:
        """Changes of one setting that give back memory in a phase, the cheapest first. Args: as `advice`."""
        config = self.config
        candidates: list[Changes] = [
            {"optim.offload": True},
            {"algorithm.ref_offload": True},
            self._fewer_rows(phase, factor),
            {"actor.logits_chunk_tokens": min(FEW_LOGITS, config.actor.logits_chunk_tokens)},
            {"model.remat": "full"},
            *({key: value} for key, value in memory_savers(config.rollout)),
            {"mesh.fsdp": 2 * self.mesh.shape["fsdp"]},
            {"optim.accumulator_dtype": "bfloat16"},
        ]
        for changes in candidates:
            if self.is_gain(changes, phase, factor):
                yield changes

    def is_gain(self, changes: Changes, phase: str, factor: float) -> bool:
        """Whether a phase takes less with other settings, which no rule forbids, and not for next to nothing.

        Args: as `advice`.
        """
        try:
            parse_config(_changed(self.config, changes).to_dict())
        except ConfigError:
            return False
        after = self.after(changes)
        gain = self.excess(phase, factor) - after.excess(phase, factor)
        assert self.limit is not None
        return gain > 0 and (gain > LEAST_GAIN * self.limit or after.fits(phase, factor))

    def _fewer_rows(self, phase: str, factor: float) -> Changes:
        """The largest micro-batch that fits, or one row where none does; {} where there is one row already."""
        config, shards = self.config, num_batch_shards(self.mesh)
        rows, length = micro_batch_shape(config, config.completions_per_update, shards)
        low, high = 1, rows // shards - 1
        if not high:
            return {}

        def change(rows: int) -> Changes:
            if config.actor.micro_batch_tokens_per_device:
                return {"actor.micro_batch_tokens_per_device": rows * length}
            return {"actor.micro_batch_size_per_device": rows}

        while low < high:
            middle = (low + high + 1) // 2
            fits = self.after(change(middle)).fits(phase, factor)
            low, high = (middle, high) if fits else (low, middle - 1)
        return change(low)

    def _combined(self, phase: str, factor: float) -> tuple[Changes, bool]:
        """Several changes that make a phase fit together, none of them for nothing; and whether they do."""
        changes: Changes = {}
        for way in self.ways(phase, factor):
            if not self.after(changes).is_gain(way, phase, factor):
                continue  # as another placement for an engine that sleeps
            changes |= way
            if self.after(changes).fits(phase, factor):
                break
        else:
            return changes, False
        for key in reversed(list(changes)):
            without = {other: value for other, value in changes.items() if other != key}
            if self.after(without).fits(phase, factor):
                changes = without
        rows = next((key for key in changes if key.startswith("actor.micro_batch")), None)
        if rows:  # one row was enough; with the other changes more may be
            others = {key: value for key, value in changes.items() if key != rows}
            changes = others | self.after(others)._fewer_rows(phase, factor)
        return changes, True

    def _described(self, changes: Changes, phase: str, factor: float) -> str:
        """Changes in words, with what each gives back after those before it."""
        texts, before = [], self
        for key, value in changes.items():
            after = before.after({key: value})
            text = f"{size_text(before.excess(phase, factor) - after.excess(phase, factor))} back"
            if key == "mesh.fsdp":
                text += f", with {after.mesh.size} devices"
            on_host = sum(after.plan.host.values()) - sum(before.plan.host.values())
            if on_host > VISIBLE:
                text += f", {size_text(on_host)} more on the host"
            texts.append(f"{key}={value} ({text})")
            before = after
        return " and ".join(texts)


def asked_bytes(message: str) -> float:
    """Bytes of the allocation that failed, from XLA's message; 0 where it does not say."""
    found = re.search(r"allocat\w* (\d+(?:\.\d+)?) ?(bytes|[KMGT](?=i?B)|B)", message)
    return float(found[1]) * UNITS[found[2]] if found else 0.0


def _changed(config: Config, changes: Changes) -> Config:
    for key, value in changes.items():
        name, _, field = key.partition(".")
        section = dataclasses.replace(getattr(config, name), **{field: value})
        config = dataclasses.replace(config, **{name: section})
    return config


def _needs(phase: str, size: float, limit: float) -> str:
    return f"phase {phase} needs {size_text(size)} of a device that has {size_text(limit)} for the trainer"


def _listed(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {size_text(size)}" for name, size in sizes.items())
