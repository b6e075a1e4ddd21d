"""A checkpoint at full size: how long training stands still, when it is on the disk, how long reading it takes.

    python benchmarks/save.py                                       # the quickstart's model
    python benchmarks/save.py --shape=qwen2.5-1.5b --folder=/scratch
    python benchmarks/save.py --shape=qwen2.5-7b --offload

Random weights and an optimizer's state that is all there, saved several times as a run does it. Beside each number
stands a limit of the same bytes in the same run: a plain copy from the devices to the host's memory, a plain write
of one file that ends with fsync, a plain reading of it. The file system is asked to forget files before they are
read. Nothing trains meanwhile: a step beside a save may be slower than others, which is not counted.
"""

import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import engine_common
import numpy as np

BUFFER = 1 << 26
WRITE, READ = "write and fsync", "read from the disk"
SHAPES = ("quickstart", *engine_common.SHAPES)


def main() -> None:
    parser = common.make_parser(__doc__)
    parser.add_argument("--shape", default="quickstart", choices=SHAPES)
    parser.add_argument("--offload", action="store_true", help="optim.offload")
    parser.add_argument("--saves", type=int, default=4, help="the first one stands alone")
    parser.add_argument(
        "--folder", default=None, help="on the disk that is measured; default: the temporary one"
    )
    args = parser.parse_args()
    common.print_environment()
    print(f"gpu       {engine_common.gpu_name()}")
    config = common.shipped("gsm8k")
    optim = dataclasses.replace(config.optim, offload=args.offload)
    config = dataclasses.replace(
        config, optim=optim, algorithm=dataclasses.replace(config.algorithm, kl_coef=0.0)
    )
    model = model_of(args.shape)
    if args.offload:
        from grpo_jax.run.devices import make_room_on_host

        make_room_on_host(config, model)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        measure(args, config, model, Path(folder))


def model_of(shape: str) -> Any:
    """`ModelConfig` of a shape, with the parameters in float32 as `model.param_dtype` has them."""
    import jax.numpy as jnp

    from grpo_jax.model.config import random_model_config

    if shape == "quickstart":
        quickstart = common.shipped("quickstart")
        model = random_model_config(quickstart.random_model)
        return dataclasses.replace(model, scan_layers=quickstart.model.scan_layers)
    with tempfile.TemporaryDirectory() as temporary:
        folder = engine_common.write_shape(Path(temporary) / "model", shape)
        model = engine_common.model_folder(folder, "bfloat16").config
    return dataclasses.replace(model, param_dtype=jnp.dtype("float32"), scan_layers=True)


def measure(args: Any, config: Any, model: Any, folder: Path) -> None:
    import jax

    from grpo_jax.config import MeshSection
    from grpo_jax.learner import make_optimizer
    from grpo_jax.model.sharding import make_mesh
    from grpo_jax.model.transformer import init_params

    mesh = make_mesh(MeshSection())
    optimizer = make_optimizer(config.optim, model, mesh, 100)

    def make_state(seed: int) -> Any:
        params = init_params(optimizer.stored_model(model), jax.random.key(seed), mesh)
        return jax.block_until_ready(optimizer.init_state(params))

    with jax.set_mesh(mesh):
        leaves = jax.tree.leaves(make_state(0))
        num_bytes = sum(leaf.nbytes for leaf in leaves)
        kinds = ", ".join(sorted({leaf.sharding.memory_kind for leaf in leaves}))
        print(f"state     {args.shape}, {num_bytes / 1e9:.3f} GB in {len(leaves)} arrays, memory {kinds}")
        write_s, read_s = write_and_read(num_bytes, folder / "plain")
        # What the host's memory has no room for twice must be written before the run goes on.
        limit = (write_s, WRITE) if optimizer.is_on_host else (copy_to_host(leaves), "copy to the host")
        del leaves
        stalls, wholes = save(args.saves, make_state, folder, optimizer.is_on_host)
        verify_s, restore_s = restore(folder, optimizer)
    median, rest = statistics.median, len(stalls) - 1
    print_line("stall, first save", stalls[0], num_bytes, *limit)
    print_line(f"stall, median of {rest}", median(stalls[1:]), num_bytes, *limit)
    print_line(f"whole on disk, median of {rest}", median(wholes[1:]), num_bytes, write_s, WRITE)
    print_line("verifying", verify_s, num_bytes, read_s, READ)
    print_line("restoring after that", restore_s, num_bytes, read_s, READ)
    print_line("both", verify_s + restore_s, num_bytes, read_s, READ)


def print_line(name: str, seconds: float, num_bytes: int, limit_s: float, limit: str) -> None:
    print(
        f"  {name:<26} {seconds:8.3f} s  {num_bytes / 1e9 / seconds:7.2f} GB/s   "
        f"limit {limit_s:8.3f} s ({limit}), {seconds / limit_s:6.2f} times that"
    )


def copy_to_host(leaves: Any) -> float:
    """Seconds of copying all arrays into memory of the host that is there already."""
    import jax

    targets = [np.zeros(leaf.shape, leaf.dtype) for leaf in leaves]

    def plainly() -> None:
        for leaf, target in zip(leaves, targets, strict=True):
            np.copyto(target, np.asarray(leaf))  # of a CPU's memory, where asarray copies nothing

    def pinned() -> None:
        place = lambda x: jax.device_put(x, x.sharding.with_memory_kind("pinned_host"), may_alias=False)
        jax.block_until_ready([place(leaf) for leaf in leaves])

    return min(common.alternate([plainly if jax.default_backend() == "cpu" else pinned], 3)[0])


def write_and_read(num_bytes: int, file: Path) -> tuple[float, float]:
    """Seconds of writing so many bytes to one file with fsync, and of reading them back."""
    buffer = memoryview(bytearray(np.random.default_rng(0).bytes(min(num_bytes, BUFFER))))

    def write() -> None:
        with file.open("wb", buffering=0) as output:
            left = num_bytes
            while left:
                left -= output.write(buffer[:left])
            os.fsync(output.fileno())

    def read() -> None:
        with file.open("rb", buffering=0) as data:
            while data.readinto(buffer):
                pass

    write_s = timed(write)
    forget(file)
    read_s = timed(read)
    file.unlink()
    return write_s, read_s


def save(
    num_saves: int, make_state: Callable[[int], Any], folder: Path, is_offloaded: bool
) -> tuple[list[float], list[float]]:
    """Returns seconds until a save returns, and until its checkpoint is whole on disk, of each save."""
    from grpo_jax.config import CheckpointSection
    from grpo_jax.run.checkpoint import Checkpointer, Progress

    section = CheckpointSection(max_to_keep=1)
    checkpointer = Checkpointer(folder / "checkpoints", section, is_offloaded=is_offloaded)
    stalls, wholes = [], []
    for step in range(1, num_saves + 1):
        state = make_state(step)  # a new one: JAX keeps what it has copied to the host
        if step == 1:
            prepare(state)
        start = time.perf_counter()
        checkpointer.save(state, Progress(step, step, 0, {}, "F32", step, [], 0.0))
        stalls.append(time.perf_counter() - start)
        checkpointer.commit()
        checkpointer.wait()
        wholes.append(time.perf_counter() - start)
        del state
    checkpointer.close()
    return stalls, wholes


def prepare(state: Any) -> None:
    """What a run does before its first step."""
    import jax

    from grpo_jax.model.sharding import abstract_like
    from grpo_jax.run.checkpoint import compile_check

    compile_check(abstract_like(state, jax.tree.map(lambda x: x.sharding, state)))


def restore(folder: Path, optimizer: Any) -> tuple[float, float]:
    """Seconds of verifying the last checkpoint, and of reading it into its devices."""
    import jax

    from grpo_jax.config import CheckpointSection
    from grpo_jax.run.checkpoint import Checkpointer

    for file in folder.rglob("*"):
        forget(file)
    checkpointer = Checkpointer(
        folder / "checkpoints", CheckpointSection(), is_offloaded=optimizer.is_on_host
    )
    verify_s = timed(checkpointer.find_good)
    restore_s = timed(lambda: jax.block_until_ready(checkpointer.restore(optimizer.abstract_state())[0]))
    checkpointer.close()
    return verify_s, restore_s


def forget(path: Path) -> None:
    """Asks the file system to read a file from the disk the next time."""
    if path.is_file():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def timed(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
