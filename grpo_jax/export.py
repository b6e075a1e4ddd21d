"""An Orbax checkpoint becomes a Hugging Face folder; of a run with LoRA, a PEFT folder.

    python -m grpo_jax.export --checkpoint=DIR --output=HF_DIR [--merge]

DIR is a run's workdir, its checkpoints folder (the latest is taken) or one checkpoint in it. With --merge, the
adapters of a run with LoRA are added to the model that they belong to, which becomes a Hugging Face folder.
"""

from pathlib import Path

import jax

from grpo_jax.config import Config, ConfigError, MeshSection
from grpo_jax.config.command_line import make_parser, one_line_errors
from grpo_jax.learner import optimizer_class
from grpo_jax.model.config import parse_hf_config
from grpo_jax.model.hf import inspect_folder, load_params, read_json, save_folder
from grpo_jax.model.lora import abstract_trained, join, trained_shardings
from grpo_jax.model.peft import save_adapter, with_adapters
from grpo_jax.model.sharding import abstract_like, make_mesh
from grpo_jax.run.checkpoint import find_checkpoint, load_for_export
from grpo_jax.run.devices import find_devices
from grpo_jax.run.hangs import watched
from grpo_jax.run.metrics import Timers
from grpo_jax.run.workdir import Workdir, check_place, start_logging


def export(checkpoint: Path, output: Path, timers: Timers, *, merge: bool = False) -> int:
    """Writes `output`; returns the step of the checkpoint.

    Args:   timers: told of each phase; merge: adapters into their model.
    Raises: ConfigError: no checkpoint there, `output` exists, or there is nothing to merge.
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
    if merge and not config.lora.rank:
        raise ConfigError("--merge", "True", "is for runs with LoRA: this one has no adapters")
    model = parse_hf_config(read_json(workdir.model_files / "config.json"), config.model)
    model = with_adapters(model, config.lora)
    # A merge takes the model as it is stored, however it was computed with.
    base = inspect_folder(workdir.base_model(config)) if config.lora.rank else None
    with timers.within("open_devices"):
        find_devices()
        mesh = make_mesh(MeshSection(data=1, fsdp=-1, tensor=1))
    with jax.set_mesh(mesh):
        abstract = abstract_like(abstract_trained(model), trained_shardings(model, mesh))
        has_masters = optimizer_class(config.optim).stored_model(model) != model
        with timers.within("restore"):
            params, progress = load_for_export(step_folder, abstract, are_on_host=has_masters)
        if merge:
            assert base is not None
            with timers.within("load_model"):
                params = join(load_params(base, base.config, mesh), params)
        with timers.within("save_folder"):
            if base is not None and not merge:
                save_adapter(output, params, model, base)
            else:
                save_folder(output, params, model, files_from=workdir.model_files, dtype=progress.hf_dtype)
    return progress.global_step


def main() -> None:
    parser = make_parser("grpo_jax.export", __doc__)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--merge", action="store_true", help="adapters into their model")
    with one_line_errors({"--workdir": "--checkpoint", "model.path": "--checkpoint"}):
        args = parser.parse_args()
        start_logging()
        for name in ("checkpoint", "output"):
            if not getattr(args, name):
                raise ConfigError(f"--{name}", "", "must name a folder")
        timers = Timers()
        with watched(timers, None, Config().trainer.phase_timeout_s):
            step = export(Path(args.checkpoint), Path(args.output), timers, merge=args.merge)
        print(f"step {step} of {args.checkpoint} -> {args.output}")


if __name__ == "__main__":
    main()
