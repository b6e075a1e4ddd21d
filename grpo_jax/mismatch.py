"""How much of the difference between trainer and engine comes from what.

    python -m grpo_jax.mismatch --config=FILE.py [--num=32] [--json=OUT.json] [--engine_head_float32]
        [--workdir=DIR] [--config.SECTION.KEY=VALUE ...]

Samples one completion of each of the first N training prompts with the configured engine, and scores these tokens
by every program there is: the engine with the tokens given, the trainer, plain attention, a head in float32, other
dtypes, and float32 in full, which all are measured against. Writes nothing but OUT.json. docs/trust.md explains
the numbers.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_jax.config import Config, ConfigError
from grpo_jax.config.command_line import USAGE, config_parser, one_line_errors, read_command_line

if TYPE_CHECKING:
    from grpo_jax.run.mismatch import Comparison


def main() -> None:
    usage = f"{USAGE} [--num=32] [--json=OUT.json] [--engine_head_float32]"
    parser = config_parser("grpo_jax.mismatch", __doc__, usage)
    parser.add_argument("--num", type=int, default=32, help="training prompts, from the first")
    parser.add_argument("--json", default="", help="file for the numbers")
    parser.add_argument(
        "--engine_head_float32",
        action="store_true",
        help="vllm: starts a second engine, whose output head computes in float32",
    )
    with one_line_errors():
        config, path, args = read_command_line(parser)
        if args.num < 1:
            raise ConfigError("--num", args.num, "must be at least 1")
        if not Path(args.json).parent.is_dir():
            raise ConfigError("--json", args.json, "its folder does not exist")
        if args.json and Path(args.json).is_dir():
            raise ConfigError("--json", args.json, "must be a file, and is a folder")
        found = _run(config, path, args)
        _report(found, config, args.json)


def _run(config: Config, path: Path, args: Any) -> Comparison:
    from grpo_jax.model.peft import with_adapters
    from grpo_jax.rollout import EngineError, check_engine, with_float32_head
    from grpo_jax.run.devices import open_devices
    from grpo_jax.run.hangs import watched
    from grpo_jax.run.inputs import read_inputs, with_kernels
    from grpo_jax.run.metrics import Timers
    from grpo_jax.run.mismatch import check_model, compare
    from grpo_jax.run.workdir import Workdir, start_logging
    from grpo_jax.weight_sync import WeightSyncError

    start_logging()
    timers = Timers()
    with watched(timers, None, config.trainer.phase_timeout_s):
        with timers.within("read_inputs"):
            check_model(config)
            second = with_float32_head(config.rollout) if args.engine_head_float32 else None
            check_engine(config.rollout)
            inputs = read_inputs(config, Workdir(path))
        assert inputs.model is not None  # it would be a random one
        with timers.within("open_devices"):
            mesh = open_devices(config, inputs.model_config, engine=config.rollout)
        folder, prompts = with_kernels(inputs.model, config, mesh), inputs.train_prompts[: args.num]
        folder = dataclasses.replace(folder, config=with_adapters(folder.config, config.lora))
        try:
            with timers.within("compare"):
                return compare(config, folder, inputs.tokenizer, prompts, mesh, float32_head=second)
        except (EngineError, WeightSyncError) as failure:
            sys.exit(f"error: {failure}")


def _report(found: Comparison, config: Config, file: str) -> None:
    from grpo_jax.run.mismatch_report import report_json, report_lines
    from grpo_jax.storage.files import write_whole

    print(*report_lines(found, config), sep="\n")
    if file:
        write_whole(Path(file), json.dumps(report_json(found, config), indent=2) + "\n")


if __name__ == "__main__":
    main()
