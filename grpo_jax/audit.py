"""Proves that every completion of a run was trained once, or left out for a reason that is named.

    python -m grpo_jax.audit WORKDIR

It reads WORKDIR/ledger, and compares it with metrics.jsonl, the checkpoints and the rollouts. Exit code 0: all of
it agrees; 1: what does not is listed. Writes nothing.
"""

from pathlib import Path

from grpo_jax.config.command_line import make_parser, one_line_errors
from grpo_jax.run.audit import Audit, audit
from grpo_jax.run.workdir import Workdir

MOST_SHOWN = 20


def report(found: Audit) -> list[str]:
    """The lines that are printed."""
    tokens = found.num_tokens
    trained, *others = sorted(found.num_completions.items(), key=lambda item: item[0] != "trained")
    weigh = f"{tokens.get('weigh', 0):,} tokens in the policy loss"
    masked = f", {tokens['masked']:,} masked" if tokens.get("masked") else ""
    lines = [f"{found.num_steps} steps", f"  {trained[1]:,} completions trained: {weigh}{masked}"]
    lines += [f"  {num:,} completions: {fate}" for fate, num in others]
    compared = ", ".join(f"{num} {name}" for name, num in found.compared.items())
    lines.append(f"  compared with {compared}")
    if not found.problems:
        return [*lines, "Every completion is accounted for, each once."]
    lines += [f"PROBLEM: {problem}" for problem in found.problems[:MOST_SHOWN]]
    if len(found.problems) > MOST_SHOWN:
        lines.append(f"and {len(found.problems) - MOST_SHOWN} more")
    return lines


def main() -> None:
    parser = make_parser("grpo_jax.audit", __doc__)
    parser.add_argument("workdir", metavar="WORKDIR")
    with one_line_errors():
        found = audit(Workdir(Path(parser.parse_args().workdir)))
        print(*report(found), sep="\n")
        if found.problems:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
