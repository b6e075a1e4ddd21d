"""Writes the page of a run: one HTML file that needs no network and no server.

    python -m grpo_jax.report WORKDIR [WORKDIR ...] [--output=FILE.html]

The page of one run is WORKDIR/report.html; that of several, beside one another, report.html of the first, or
FILE.html. Works on a run that is under way, has failed, or has damaged files.
"""

from pathlib import Path

from grpo_jax.config.command_line import make_parser, one_line_errors


def main() -> None:
    parser = make_parser("grpo_jax.report", __doc__)
    parser.add_argument("workdirs", metavar="WORKDIR", nargs="+")
    parser.add_argument("--output", metavar="FILE.html", default="", help="default: WORKDIR/report.html")
    with one_line_errors():
        args = parser.parse_args()
        from grpo_jax.report.write import write_report

        paths = [Path(path) for path in args.workdirs]
        file = write_report(paths, Path(args.output) if args.output else None)
        print(f"{file}   ({file.stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    main()
