"""Writes the page of a run: one HTML file that needs no network and no server.

    python -m grpo_jax.report WORKDIR [WORKDIR ...] [--output=FILE.html]
    python -m grpo_jax.report WORKDIR --step=N

The page of one run is WORKDIR/report.html, with a page for each of the last 100 steps whose rollouts were saved;
that of several, beside one another, is comparison.html in the first; or FILE.html. With --step, the page of that
step alone is written. Works on a run that is under way, has failed, or has damaged files.
"""

from pathlib import Path

from grpo_jax.config.command_line import make_parser, one_line_errors


def main() -> None:
    parser = make_parser("grpo_jax.report", __doc__)
    parser.add_argument("workdirs", metavar="WORKDIR", nargs="+")
    parser.add_argument(
        "--output", metavar="FILE.html", default="", help="of the page of the run, or of the runs"
    )
    parser.add_argument("--step", type=int, help="whose page is written, alone")
    with one_line_errors():
        args = parser.parse_args()
        if args.step is not None and (len(args.workdirs) > 1 or args.output):
            parser.error("--step is for one WORKDIR, without --output")
        from grpo_jax.config.text import printable
        from grpo_jax.report.read import read_run
        from grpo_jax.report.write import write_runs, write_step
        from grpo_jax.run.workdir import Workdir

        paths = [Path(path) for path in args.workdirs]
        if args.step is None:
            runs = [read_run(path) for path in paths]
            file = write_runs(runs, Path(args.output) if args.output else None)
            for run in runs:
                for note in run.notes:
                    print(printable(f"{run.path}: {note}"))
        else:
            file = write_step(Workdir(paths[0]), args.step)
        print(f"{file}   ({file.stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    main()
