"""The programs of a run, compiled for devices that are not here; what the compiler says of them.

The real programs, from shapes alone: of scoring, the update and the optimizer by `Learner.compile`, of the local
engine, and of packing a push. Nothing is run.
"""

import dataclasses
import time

import jax
from jax.sharding import Mesh

from grpo_jax.algorithm import Algorithm
from grpo_jax.config import Config, ConfigError
from grpo_jax.learner.compiling import Program, compile_ahead, program_bytes, programs_compiled
from grpo_jax.learner.hlo import Facts, read_facts
from grpo_jax.learner.learner import Learner
from grpo_jax.learner.offload import device_bytes
from grpo_jax.model.config import ModelConfig
from grpo_jax.model.sharding import make_mesh
from grpo_jax.rollout import device_programs
from grpo_jax.run.devices import set_products
from grpo_jax.run.metrics import Timers
from grpo_jax.run.targets import kernels_of

NAMES = {
    "forward_pass": "score",
    "backward": "gradients",
    "apply": "optimizer",
    "check": "norm of gradients",
    "_changed": "optimizer",  # of one parameter: the largest
    "cast": "cast",
    "zeros": "empty sums",
    "add_up": "sum of gradients",
    "sample_completions": "sampling",
    "_pack_bucket": "push",
}
"""Function -> name of its program for people."""
NUM_STEPS = 100
"""Of the run; no program depends on it but by the schedule of the learning rate."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One program."""

    name: str
    num_bytes: int
    """That it takes on one device, its arguments and results included."""
    facts: Facts


@dataclasses.dataclass(frozen=True)
class Compilation:
    """All programs of a run."""

    programs: list[Compiled]
    phases: dict[str, int]
    """Phase of the plan -> bytes on one device while its largest program runs, with what waits beside it."""
    seconds: float


def compile_run(config: Config, model: ModelConfig, devices: list[jax.Device]) -> Compilation:
    """Compiles all programs of a run for devices that need not be here.

    Args:   model: with the attention kernel of these devices.
    Raises: ConfigError: the mesh does not fit the devices, or the description of a GPU lacks what the run needs.
    """
    reference_on_host = config.uses_reference and config.algorithm.ref_offload
    if devices[0].platform == "gpu" and (config.optim.offload or reference_on_host):
        rule = (
            "needs optim.offload=False and algorithm.ref_offload=False for GPUs: described ones have no host"
        )
        raise ConfigError("compile", "True", rule)
    mesh = make_mesh(config.mesh, devices)
    set_products(config.model)
    start = time.perf_counter()
    # Not `jax.set_mesh`: what is computed while a program is traced, as a kernel's tables, is computed here.
    within = jax.sharding.use_abstract_mesh(mesh.abstract_mesh)
    with within, kernels_of(devices), programs_compiled() as programs:
        learner = Learner(
            config, Algorithm.of(config.algorithm), model, mesh, num_steps=NUM_STEPS, timer=Timers()
        )
        phases = learner.compile()
        phases |= _compile_engine(config, learner, mesh)
    seconds = time.perf_counter() - start
    return Compilation([_described(program) for program in _unique(programs)], phases, seconds)


def _compile_engine(config: Config, learner: Learner, mesh: Mesh) -> dict[str, int]:
    """Compiles what the engine makes the devices do. Returns bytes by phase, as `Learner.compile`."""
    state = learner.optimizer.abstract_state()
    params = learner.params(state)
    reference = device_bytes(learner.reference.abstract()) if config.uses_reference else 0
    waiting = device_bytes(state) - device_bytes(state.params) + reference
    phase, programs = device_programs(config, learner.model, params, mesh)
    sizes = [compile_ahead(step, *args, **static)[1] for step, args, static in programs]
    return {phase: max(sizes) + waiting}


def _unique(programs: list[Program]) -> list[Program]:
    """Each program once. Those of a push differ little: the largest stands for all."""
    found: dict[str, Program] = {}
    for program in programs:
        known = found.get(program.name)
        if known is None or program_bytes(program.compiled) > program_bytes(known.compiled):
            found[program.name] = program
    return list(found.values())


def _described(program: Program) -> Compiled:
    facts = read_facts(program.compiled.as_text())
    return Compiled(NAMES.get(program.name, program.name), program_bytes(program.compiled), facts)
