"""An Orbax checkpoint becomes a Hugging Face folder.

    python -m grpo_jax.export --checkpoint=DIR --output=HF_DIR

DIR is a run's workdir, its checkpoints folder (the latest is taken) or one checkpoint in it.
"""

from pathlib import Path

import jax

from grpo_jax.config import Config, ConfigError, MeshSection
from grpo_jax.config.command_line import make_parser, one_line_errors
from grpo_jax.learner import optimizer_class
from grpo_jax.model.config import parse_hf_config
from grpo_jax.model.hf import read_json, save_folder
from grpo_jax.model.sharding import abstract_like, make_mesh
from grpo_jax.model.transformer import abstract_params, param_shardings
from grpo_jax.run.checkpoint import find_checkpoint, load_for_export
from grpo_jax.run.devices import find_devices
from grpo_jax.run.hangs import watched
from grpo_jax.run.metrics import Timers
from grpo_jax.run.workdir import Workdir, check_place


def export(checkpoint: Path, output: Path, timers: Timers) -> int:
    """Writes `output`; returns the step of the checkpoint.

    Args:   timers: told of each phase.
    Raises: ConfigError: no checkpoint there, or `output` exists.
    """
    if output.exists():
        raise ConfigError("--output", str(output), "exists already; nothing was overwritten")
    check_place("--output", output)
    with timers.within("find_checkpoint"):
        step_folder = find_checkpoint(checkpoint)
    workdir = Workdir(step_folder.parent.parent)
    config = workdir.read_config()
    if config is None:
        raise ConfigError("--checkpoint", str(workdir.config), "is missing or empty; an export needs it")
    model = parse_hf_config(read_json(workdir.model_files / "config.json"), config.model)
    with timers.within("open_devices"):
        find_devices()
        mesh = make_mesh(MeshSection(data=1, fsdp=-1, tensor=1))
    with jax.set_mesh(mesh):
        abstract = abstract_like(abstract_params(model)[0], param_shardings(model, mesh))
        has_masters = optimizer_class(config.optim).stored_model(model) != model
        with timers.within("restore"):
            params, progress = load_for_export(step_folder, abstract, are_on_host=has_masters)
        with timers.within("save_folder"):
            save_folder(output, params, model, files_from=workdir.model_files, dtype=progress.hf_dtype)
    return progress.global_step


def main() -> None:
    parser = make_parser("grpo_jax.export", __doc__)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--output", required=True)
    with one_line_errors({"--workdir": "--checkpoint", "model.path": "--checkpoint"}):
        args = parser.parse_args()
        timers = Timers()
        with watched(timers, None, Config().trainer.phase_timeout_s):
            step = export(Path(args.checkpoint), Path(args.output), timers)
        print(f"step {step} of {args.checkpoint} -> {args.output}")


if __name__ == "__main__":
    main()
