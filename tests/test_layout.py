"""The borders between the folders of the package: who may import whom, and what stands in its root."""

import ast
import graphlib
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "grpo_jax"
COMMANDS = {
    "train", "evaluate", "export", "sft", "doctor", "plan", "mismatch", "audit", "inspect", "init", "fetch",
}  # fmt: skip
FLOORS = (  # a folder imports from the floors below its own, never from beside it
    {"config"},
    {"types", "storage"},
    {"data", "algorithm", "model", "rewards"},
    {"learner", "weight_sync"},
    {"rollout"},
    {"run"},
    {"report"},
    COMMANDS,
)
FLOOR_OF = {room: number for number, floor in enumerate(FLOORS) for room in sorted(floor)}
PURE = ("types", "algorithm", "model", "learner")
SHELL = {
    "os",
    "io",
    "time",
    "shutil",
    "subprocess",
    "socket",
    "tempfile",
    "threading",
    "multiprocessing",
    "ray",
}
"""Modules of files, clocks and other processes."""
SIBLINGS = ("learner", "rollout")


def room_of(module):
    """The folder, or the file of the root, that a module of the package is in; "" for the package itself."""
    return module.split(".")[1] if "." in module else ""


def imports_of(path, *, at_import=False):
    """The modules of the package that a file imports; with `at_import`, without those of functions and types."""
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree))
    if at_import:
        late = [n for n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
        late += [n for n in nodes if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
        inner = {id(node) for outer in late for node in ast.walk(outer)}
        nodes = [node for node in nodes if id(node) not in inner]
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("grpo_jax"):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if exists(name) else node.module
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("grpo_jax"))


def exists(module):
    path = PACKAGE.parent / module.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").exists()


def name_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in PACKAGE.rglob("*.py")}


def test_the_root_holds_the_commands_and_the_types():
    files = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert files == COMMANDS | {"types"}
    assert files | folders == set(FLOOR_OF)


@pytest.mark.parametrize("room", FLOOR_OF)
def test_imports_run_one_way(room):
    files = {name: path for name, path in FILES.items() if room_of(name) == room}
    upwards = {
        f"{name} imports {module}"
        for name, path in files.items()
        for module in imports_of(path)
        if room_of(module) != room and FLOOR_OF[room_of(module)] >= FLOOR_OF[room]
    }
    assert files and not upwards


@pytest.mark.parametrize("room", SIBLINGS)
def test_siblings_know_nothing_of_one_another(room):
    (other,) = set(SIBLINGS) - {room}
    files = [path for name, path in FILES.items() if room_of(name) == room]
    assert not [module for path in files for module in imports_of(path) if room_of(module) == other]


@pytest.mark.parametrize("room", PURE)
def test_pure_folders_know_no_file_clock_or_process(room):
    files = {name: path for name, path in FILES.items() if room_of(name) == room}
    found = {}
    for name in files.keys() - {"grpo_jax.model.hf", "grpo_jax.model.random_model"}:
        nodes = list(ast.walk(ast.parse(files[name].read_text())))
        used = {a.name.split(".")[0] for n in nodes if isinstance(n, ast.Import) for a in n.names}
        used |= {(n.module or "").split(".")[0] for n in nodes if isinstance(n, ast.ImportFrom)}
        used |= {"io" for n in nodes if isinstance(n, ast.Name) and n.id == "open"}
        found[name] = used & SHELL
    assert files and not any(found.values()), found


def test_no_file_imports_itself_by_way_of_others():
    graph = {}
    for name, path in FILES.items():
        graph[name] = set(imports_of(path, at_import=True)) - {name}
        # A folder's `__init__` runs before its files, so an import of it is no wait for it.
        graph[name] -= {name.rpartition(".")[0]}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names them


def test_vllm_is_known_in_its_folder_alone():
    """Its modules and Ray's are imported there, and where buckets go through Ray's object store."""
    found = set()
    for name, path in FILES.items():
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(module.split(".")[0] in ("vllm", "ray") for module in modules):
                found.add(".".join(name.split(".")[1:-1]))
    assert found == {"rollout.vllm", "weight_sync"}
