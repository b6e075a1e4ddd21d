"""Shows a run, or the tokens of one of its steps, on the terminal.

    python -m grpo_jax.inspect WORKDIR
    python -m grpo_jax.inspect WORKDIR --step=N [--group=K] [--colour=WHAT] [--sort=BY] [--show=WHICH] [--most=M]

A step can be looked at if its rollouts were saved (logging.save_rollouts). Tokens are blue where the quantity is
high, red where it is low, and underlined where their ratio was clipped. Writes nothing.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_jax.config import ConfigError
from grpo_jax.config.command_line import Parser, make_parser, one_line_errors

if TYPE_CHECKING:
    from grpo_jax.report.rollouts import SavedStep

QUANTITIES = ("sampler", "trainer", "difference", "ratio", "advantage", "mask", "version")
SORTS = ("sampled", "mismatch", "longest", "reward")
OF_TOKENS = ("mismatch", "repeats", "clipped")
"""Sorts and filters that a step without its Parquet file cannot have."""
FILTERS = ("all", "wrong", "mixed", "repeats", "cut", "clipped")


def command_parser() -> Parser:
    parser = make_parser("grpo_jax.inspect", __doc__)
    parser.add_argument("workdir", metavar="WORKDIR")
    parser.add_argument("--step", type=int, help="whose groups are shown; without it, the run as a whole")
    parser.add_argument("--group", type=int, help="that group alone")
    parser.add_argument("--colour", choices=QUANTITIES, default="", help="of the tokens; default: sampler")
    parser.add_argument(
        "--sort", choices=SORTS, default="sampled", help="order of the groups; default: sampled"
    )
    parser.add_argument("--show", choices=FILTERS, default="all", help="groups; default: all")
    parser.add_argument("--most", type=int, default=4, help="groups; default: 4")
    return parser


def main() -> None:
    with one_line_errors():
        args = command_parser().parse_args()
        if args.step is None:
            _refuse_flags_of_steps(args)
        from rich.console import Console

        from grpo_jax.report import read, rollouts, terminal
        from grpo_jax.run.workdir import Workdir

        workdir = Workdir(Path(args.workdir))
        console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
        if args.step is None:
            console.print(terminal.run_view(read.read_run(workdir.path)))
            return
        read.check_is_run(workdir)
        saved = rollouts.read_step(workdir, args.step)
        if not saved.has_tokens:
            _refuse_flags_of_tokens(args, saved)
        options = dict(
            quantity=args.colour or "sampler",
            sort=args.sort,
            show=args.show,
            most=args.most,
            group=args.group,
        )
        console.print(terminal.step_view(saved, **options))


def _refuse_flags_of_steps(args: Any) -> None:
    """Raises: ConfigError: a flag is given that is for the groups of a step."""
    defaults = vars(command_parser().parse_args([args.workdir]))
    for name in ("group", "colour", "sort", "show", "most"):
        if getattr(args, name) != defaults[name]:
            raise ConfigError(
                f"--{name}", getattr(args, name), "needs --step=N: it is for the groups of a step"
            )


def _refuse_flags_of_tokens(args: Any, saved: "SavedStep") -> None:
    """Raises: ConfigError: a flag is given that needs what is known of tokens."""
    needed = {"colour": args.colour, "sort": args.sort in OF_TOKENS, "show": args.show in OF_TOKENS}
    for name, is_given in needed.items():
        if is_given:
            rule = f"needs the tokens of step {saved.step}: {'; '.join(saved.notes)}"
            raise ConfigError(f"--{name}", getattr(args, name), rule)


if __name__ == "__main__":
    main()
