"""The floor plan of the package in numbers, of one source tree or of several beside one another.

    python benchmarks/floor_plan.py                    # of this tree
    git worktree add /tmp/before COMMIT
    python benchmarks/floor_plan.py --suite /tmp/before .   # before and after; runs the default tests of both

Counted from the source, with Python's own parser: modules and lines, the longest function, the most parameters of
a function (`self` not counted), imports of train.py, the files of `READING` and their lines, places that name a
policy loss, and pairs of modules that import one another, directly or by way of others, functions' own imports
included. --suite adds the seconds of `pytest` in each tree: it wants a quiet machine.
"""

import argparse
import ast
import os
import pathlib
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator

Function = ast.FunctionDef | ast.AsyncFunctionDef

READING = {
    "train", "types", "stages", "prompts", "batching", "advantages", "losses", "policy_losses", "ratios", "kl",
    "corrections", "update", "reference", "rollout", "rollout.base", "rollout.ahead", "rollout.dynamic",
    "rewards.base", "rewards.gsm8k",
    "data.prompts", "rollout.batches", "learner.learner", "learner.batching", "learner.packing", "learner.update",
    "learner.optimizer", "learner.reference", "algorithm", "algorithm.advantages", "algorithm.loss",
    "algorithm.policy_losses", "algorithm.ratios", "algorithm.kl", "algorithm.corrections", "config.sections",
}  # fmt: skip
"""What a newcomer reads of a step before the model, and configs/gsm8k.py; the old names and the new ones."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("trees", nargs="*", default=["."], help="roots of source trees")
    parser.add_argument("--suite", action="store_true", help="run each tree's default tests and time them")
    args = parser.parse_args()
    trees = [Tree(pathlib.Path(tree).resolve()) for tree in args.trees]
    columns = [tree.measures() for tree in trees]
    for name in columns[0]:
        print(f"{name:<44}", *(f"{column[name]:>34}" for column in columns), flush=True)
    if args.suite:
        print(f"{'default tests':<44}", *(f"{tree.suite():>34}" for tree in trees))


class Tree:
    """The files of grpo_jax/ below a root."""

    def __init__(self, root: pathlib.Path):
        self.root = root
        files = sorted((root / "grpo_jax").rglob("*.py"))
        self.sources = {self._module(file): file.read_text() for file in files}
        self.asts = {name: ast.parse(source) for name, source in self.sources.items()}

    def _module(self, file: pathlib.Path) -> str:
        return ".".join(file.relative_to(self.root).with_suffix("").parts).removesuffix(".__init__")

    def measures(self) -> dict[str, str]:
        functions = [(node, name) for name, tree in self.asts.items() for node in functions_of(tree)]
        long, where_long = max(functions, key=lambda pair: length(pair[0]))
        many, where_many = max(functions, key=lambda pair: parameters(pair[0]))
        reading = [name for name in self.sources if name.removeprefix("grpo_jax.") in READING]
        lines = sum(map(self.lines, reading))
        lines += (self.root / "configs" / "gsm8k.py").read_text().count("\n")
        show = lambda node, where: f"({where.removeprefix('grpo_jax.')}.{node.name})"
        return {
            "modules in the root": str(len(list((self.root / "grpo_jax").glob("*.py")))),
            "modules": str(len(self.sources)),
            "lines of the package": f"{sum(map(self.lines, self.sources)):,}",
            "those of code": f"{self.code():,}",
            "longest function, lines": f"{length(long)} {show(long, where_long)}",
            "most parameters": f"{parameters(many)} {show(many, where_many)}",
            "imported names in train.py": str(len(list(imported(self.asts["grpo_jax.train"])))),
            "modules imported in train.py": str(len(set(self.imports("grpo_jax.train")))),
            "files before the model, and their lines": f"{len(reading) + 1}, {lines:,}",
            "places that name the policy loss 'sapo'": str(self.places("sapo")),
            "import circles": str(self.circles()),
        }

    def lines(self, name: str) -> int:
        return self.sources[name].count("\n")

    def code(self) -> int:
        """Lines without docstrings, comments and blank ones."""
        files = (self.root / "grpo_jax").rglob("*.py")
        return sum(bool(line.strip()) for file in files for line in code_lines(file))

    def suite(self) -> str:
        """Runs the default tests as the tree's README does: their seconds and pytest's last line."""
        options = ["-n", "2", "--dist", "loadfile"]
        options *= shlex.join(options) in (self.root / "README.md").read_text()
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options],
            cwd=self.root,
            env=os.environ | {"PYTHONPATH": str(self.root)},
            capture_output=True,
            text=True,
        )
        counts = done.stdout.strip().splitlines()[-1].partition(" in ")[0].split(",")[0]
        return f"{time.perf_counter() - start:.0f} s, {counts}"

    def imports(self, name: str) -> Iterator[str]:
        """Modules of the package that a module imports, its functions included."""
        for node in ast.walk(self.asts[name]):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("grpo_jax"):
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    yield full if full in self.sources else str(node.module)

    def places(self, loss: str) -> int:
        """Lines of package, recipes and tests' helpers that hold the name of a policy loss, or of its function."""
        files = [*(self.root / "grpo_jax").rglob("*.py"), *(self.root / "configs").glob("*.py")]
        helpers = [*(self.root / "tests").rglob("loss_helpers.py")]
        return sum(loss in line.lower() for file in [*files, *helpers] for line in code_lines(file))

    def circles(self) -> int:
        """Pairs of modules that wait for one another, directly or by way of others."""
        graph = {name: set(self.imports(name)) - {name, name.rpartition(".")[0]} for name in self.sources}
        reached = {name: reach(graph, name) for name in graph}
        return sum(a < b and a in reached[b] and b in reached[a] for a in graph for b in graph)


def code_lines(file: pathlib.Path) -> list[str]:
    """The lines of a file without those of docstrings and comments."""
    source = file.read_text()
    strings = {
        number
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for number in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    lines = enumerate(source.splitlines(), start=1)
    return [line.partition("#")[0] for number, line in lines if number not in strings]


def functions_of(tree: ast.Module) -> list[Function]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def length(node: Function) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def parameters(node: Function) -> int:
    names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return len([name for name in names if name not in ("self", "cls")])


def imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.name for alias in node.names)


def reach(graph: dict[str, set[str]], start: str) -> set[str]:
    found: set[str] = set()
    todo = [start]
    while todo:
        for name in graph.get(todo.pop(), ()):
            if name not in found:
                found.add(name)
                todo.append(name)
    return found


if __name__ == "__main__":
    main()
