"""What the benchmarks share: the report's head, a random model in a temporary folder, interleaved timing.

torch and transformers are the peers; they are imported here and in the scripts, never by the package.
"""

import argparse
import datetime
import importlib.metadata
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PACKAGES = ("grpo_jax", "jax", "jaxlib", "flax", "optax", "torch", "transformers", "safetensors", "numpy")


def make_parser(doc: str) -> argparse.ArgumentParser:
    """A parser whose --help starts with the module's docstring."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def shipped(name: str) -> Any:
    """The `Config` of configs/NAME.py."""
    from grpo_jax.config import load_config, parse_config

    return parse_config(load_config(Path(__file__).resolve().parents[1] / "configs" / f"{name}.py"))


def without(sections: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """The overrides, --config.SECTION.KEY=VALUE, but for those of sections that the run does not read."""
    return [text for text in overrides if not text.startswith(tuple(f"--config.{s}." for s in sections))]


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Sizes of the random Qwen2-shaped model; the quickstart's by default."""
    config = shipped("quickstart")
    sizes = config.random_model
    parser.add_argument("--vocab", type=int, default=sizes.vocab_size)
    parser.add_argument("--hidden", type=int, default=sizes.hidden_size)
    parser.add_argument("--mlp", type=int, default=sizes.intermediate_size)
    parser.add_argument("--layers", type=int, default=sizes.num_layers)
    parser.add_argument("--heads", type=int, default=sizes.num_heads)
    parser.add_argument("--kv_heads", type=int, default=sizes.num_kv_heads)
    parser.add_argument(
        "--scan_layers",
        action=argparse.BooleanOptionalAction,
        default=config.model.scan_layers,
        help="model.scan_layers",
    )


def describe_model(args: Any) -> str:
    heads = f"{args.heads}/{args.kv_heads} heads"
    sizes = f"width {args.hidden}, MLP {args.mlp}, {args.layers} layers, {heads}, vocabulary {args.vocab:,}"
    return f"model     {sizes}, float32, layers {'scanned' if args.scan_layers else 'unrolled'}"


def print_environment() -> None:
    """Hardware, load, versions and date: figures mean nothing without them."""
    load, cpus = os.getloadavg(), os.cpu_count() or 1
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    threads = os.environ.get("OMP_WAIT_POLICY", "(default)")
    print(f"date      {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC")
    print(f"hardware  {_cpu_name()}, {cpus} CPUs, {_memory_gb():.0f} GB")
    print(f"load      {', '.join(f'{x:.1f}' for x in load)} (1, 5, 15 minutes); OMP_WAIT_POLICY {threads}")
    print(f"versions  Python {platform.python_version()}, {versions}")


def warn_if_busy() -> None:
    """torch's threads spin while they wait for a core, and lose far more by that than ours."""
    if os.getloadavg()[0] > (os.cpu_count() or 1) / 4 and os.environ.get("OMP_WAIT_POLICY") != "PASSIVE":
        print("warning   other work is running: OMP_WAIT_POLICY=PASSIVE is fairer to PyTorch then")


def version(name: str) -> str:
    """Of an installed distribution, or "(none)"."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "(none)"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()} ({platform.machine()})"


def _memory_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def require_peer() -> None:
    """Ends with one line where torch, the peer's framework, is missing."""
    try:
        import torch  # noqa: F401
    except ImportError:
        sys.exit("the peer needs torch: pip install -e '.[test]'")


def measure_shapes(
    measure: Callable[[Any], float], args: argparse.Namespace, shapes: dict[str, dict[str, int]]
) -> None:
    """Measures the shape of `args`, or, with --table, each of `shapes` and then prints all ratios.

    Args: measure: prints both sides' speeds for one set of sizes, and returns their ratio.
    """
    require_peer()
    print_environment()
    warn_if_busy()
    if not args.table:
        measure(args)
        return
    ratios = {}
    for name, sizes in shapes.items():
        print(f"\n{name}")
        ratios[name] = measure(argparse.Namespace(**{**vars(args), **sizes}))
    print("\nratio of tokens/s")
    for name, ratio in ratios.items():
        print(f"  {ratio:6.2f}   {name}")


def write_random_model(folder: Path, args: Any, *, vocab: int | None = None) -> None:
    """Writes a Hugging Face folder: random weights of the sizes in `args`, and a tokenizer of at most `vocab`."""
    from grpo_jax.config import MeshSection, RandomModelSection
    from grpo_jax.data.arithmetic import generate_splits
    from grpo_jax.model.random_model import make_random_model, make_tokenizer
    from grpo_jax.model.sharding import make_mesh

    rows = generate_splits(num_train=200, num_val=0, num_sft=0, difficulty=3, direct_share=0.0, seed=0)
    texts = [row["extra_info"]["question"] for row in rows["train"]]
    section = RandomModelSection(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.mlp,
        num_layers=args.layers,
        num_heads=args.heads,
        num_kv_heads=args.kv_heads,
    )
    tokenizer = make_tokenizer(texts, min(args.vocab, vocab or 512))
    mesh = make_mesh(MeshSection(fsdp=1))
    make_random_model(folder, section, tokenizer, seed=0, mesh=mesh)


def alternate(runs: Sequence[Callable[[], Any]], rounds: int) -> list[list[float]]:
    """Times the runs in turn, so that a machine that is busy for a while slows all of them.

    Returns: seconds of each run in each round; one untimed call of each comes first.
    """
    for run in runs:
        run()
    seconds: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, times in zip(runs, seconds, strict=True):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return seconds


def print_comparison(seconds: Sequence[Sequence[float]], tokens: int, peer: str, aim: float) -> float:
    """Prints tokens/s of ours and the peer's and the ratio, ours / theirs, of medians and of fastest rounds.

    Other work on the machine slows both, but seldom evenly (torch's threads spin while they wait for a core),
    so the aim counts as reached only where both ratios reach it.

    Returns: the smaller of the two ratios.
    """
    for name, times in zip(("grpo_jax", peer), seconds, strict=True):
        median, fastest = statistics.median(times), min(times)
        print(
            f"  {name:<22} {tokens / median:>9,.0f} tokens/s, fastest round {tokens / fastest:>9,.0f} "
            f"({median:.3f} s, {fastest:.3f} s)"
        )
    ours, theirs = seconds
    ratios = statistics.median(theirs) / statistics.median(ours), min(theirs) / min(ours)
    ratio = min(ratios)
    verdict = "reached" if ratio >= aim else "not reached"
    print(
        f"  {'ratio':<22} {ratios[0]:>9.2f}           fastest round {ratios[1]:>9.2f} (aim {aim:g}: {verdict})"
    )
    return ratio
