"""GRPO training, from a configuration to a Hugging Face folder.

    python -m grpo_jax.train --config=FILE.py [--workdir=DIR] [--config.SECTION.KEY=VALUE ...]

One step (`grpo_step`), in seven sentences:

1. `data/prompts.py` takes the next P prompts from a shuffled dataset over Parquet.
2. `rollout/` asks the rollout engine for G completions each, with the log-probability of every token.
3. `rewards/` turns (prompt, completion) into a number; `rollout/batches.py` hands out 1 to 3 as a `ScoredBatch`.
4. `learner/batching.py` lays the completions out as a `TrainBatch`.
5. `algorithm/advantages.py` turns rewards [P, G] into advantages [P, G]; `algorithm/loss.py` is the mathematics.
6. `learner/forward.py` scores (old and reference log-probabilities); `learner/update.py` makes the update of it.
7. `weight_sync/` gives the new weights to the engine; `run/` validates, saves and reports.

The same command goes on where a run stopped: by itself, by Ctrl-C or by a crash.
"""

if __name__ == "__main__":  # first: numpy starts threads, which would get heaps of their own
    from grpo_jax.run.heap import keep_freed_memory

    keep_freed_memory()

from pathlib import Path

from grpo_jax.config import Config
from grpo_jax.config.command_line import config_parser, one_line_errors, read_command_line
from grpo_jax.learner.batching import make_train_batch
from grpo_jax.report.live import reported
from grpo_jax.report.starts import Recipe
from grpo_jax.run.hosts import ALONE, Hosts, joined
from grpo_jax.run.run import Run, open_run
from grpo_jax.types import StepResult, TrainState


def grpo_step(run: Run, state: TrainState, step: int) -> tuple[TrainState, StepResult]:
    """Step number `step`, counted from 0: prompts, rollouts, rewards, advantages, updates, new weights.

    Args:    state: donated; the returned one takes its place.
    Returns: the new train state, and what the step leaves for the reports.
    """
    rollouts = run.rollouts.take()  # 1 to 3
    batch = make_train_batch(rollouts.groups, pad_id=run.pad_id, version=step)  # 4
    state, result = run.learner.learn(state, batch, rollouts, step)  # 5 and 6
    run.give_weights(state, version=step + 1)  # 7
    return state, result


def train(config: Config, path: Path, hosts: Hosts = ALONE, recipe: Recipe | None = None) -> None:
    """Runs the whole training of a configuration in the workdir `path`, or what is left of it.

    Args:   hosts: the processes of the run, of which this is one; recipe: where the configuration comes from.
    Raises: as `open_run` and `Run.after_step`.
    """
    with reported(config, path, hosts, recipe) as report, open_run(config, path, hosts) as run:
        report.begin(run.num_steps)
        state = run.begin()
        for step in run.steps():
            with run.timers("step"):
                state, result = grpo_step(run, state, step)
            state = run.after_step(state, result, step)
        run.finish()


def main() -> None:
    with one_line_errors():
        config, path, args = read_command_line(config_parser("grpo_jax.train", __doc__))
        with joined(config, path) as hosts:
            train(config, path, hosts, Recipe(args.config, args.replaced))


if __name__ == "__main__":
    main()
