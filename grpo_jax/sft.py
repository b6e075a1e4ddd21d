"""Supervised fine-tuning on worked examples, as a warm start: the same model, batches and update as GRPO.

    python -m grpo_jax.sft --config=configs/quickstart.py

writes the Hugging Face folder WORKDIR/sft-model. `train` does the same by itself where sft.num_steps > 0.
"""

if __name__ == "__main__":  # first: numpy starts threads, which would get heaps of their own
    from grpo_jax.run.heap import keep_freed_memory

    keep_freed_memory()

from grpo_jax.config import ConfigError
from grpo_jax.config.command_line import one_line_errors, parse_command_line


def main() -> None:
    with one_line_errors():
        config, path = parse_command_line("grpo_jax.sft", __doc__)
        from grpo_jax.run.devices import open_devices
        from grpo_jax.run.hangs import watched
        from grpo_jax.run.inputs import check_workdir, make_model, read_inputs
        from grpo_jax.run.metrics import Timers
        from grpo_jax.run.workdir import Workdir, start_logging

        workdir = Workdir(path)
        if not config.sft.num_steps:
            raise ConfigError("sft.num_steps", 0, "must be above 0 to fine-tune")
        check_workdir(config, workdir)
        if workdir.sft_model.exists():
            raise ConfigError("--workdir", str(path), f"already holds {workdir.sft_model.name}")
        timers = Timers()
        with watched(timers, workdir.hangs, config.trainer.phase_timeout_s):
            with timers.within("read_inputs"):
                start_logging()
                inputs = read_inputs(config, workdir)
            with timers.within("open_devices"):
                mesh = open_devices(config, inputs.model_config, engine=None)
            try:
                with workdir.hold(config), timers.within("make_model"):
                    workdir.open(config, inputs.beginning)
                    make_model(config, inputs, workdir, mesh)
            except FloatingPointError as error:
                raise SystemExit(f"error: {error}") from None  # exit code 1


if __name__ == "__main__":
    main()
