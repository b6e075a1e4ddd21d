"""Peak host memory while a model is loaded, in multiples of the model's size.

    python benchmarks/load_memory.py            # a Qwen2-shaped float32 folder of about 1 GB
    python benchmarks/load_memory.py --gb=4

Claimed: at most 1.2 times. On a CPU the loaded parameters themselves are in host memory, which is 1.0 of it; the
rest is what loading needs on top. Each side loads in a fresh process: the highest resident set while loading
(VmHWM, so files that are mapped count), less the resident set just before. Beside it stands transformers'
`from_pretrained`; it may leave parameters on disk until they are used, so all of them are read once.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import common
import numpy as np

AIM = 1.2
SIZES = dict(vocab=32_000, hidden=1024, mlp=2816, heads=16, kv_heads=4)


def main() -> None:
    parser = common.make_parser(__doc__)
    parser.add_argument("--gb", type=float, default=1.0, help="size of the model, 10^9 bytes, nearest layer")
    parser.add_argument("--shards", type=int, default=1, help="safetensors files that it is split into")
    parser.add_argument("--child", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(load(*args.child)))
        return
    common.require_peer()
    common.print_environment()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        size = write_model(folder, args.gb, args.shards)
        print(f"model     {size / 1e9:.2f} GB in {args.shards} file(s), float32, {json.dumps(SIZES)}")
        for side, name in (("ours", "grpo_jax"), ("peer", "transformers")):
            command = [sys.executable, __file__, "--child", side, str(folder)]
            output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            result = json.loads(output.splitlines()[-1])
            ratio = (result["peak"] - result["before"]) / size
            aim = f" (aim {AIM}: {'reached' if ratio <= AIM else 'not reached'})" if side == "ours" else ""
            print(
                f"  {name:<14} peak {ratio:.2f} times the model{aim}; "
                f"{result['before'] / 1e9:.2f} GB before, {result['peak'] / 1e9:.2f} GB at most"
            )


def write_model(folder: Path, gigabytes: float, shards: int) -> int:
    """Writes a folder with random weights. Returns the bytes of its weights."""
    from safetensors.numpy import save_file

    from grpo_jax.model.config import ModelConfig, hf_config, parse_hf_config
    from grpo_jax.model.hf import stored_bytes

    def config_json(layers: int) -> dict[str, Any]:
        config = ModelConfig(
            SIZES["vocab"], SIZES["hidden"], SIZES["mlp"], layers, SIZES["heads"], SIZES["kv_heads"],
            SIZES["hidden"] // SIZES["heads"], 10_000.0, 1e-6, tie_embeddings=True, qkv_bias=True, qk_norm=False,
        )  # fmt: skip
        return hf_config(config, eos_token_id=0, pad_token_id=0)

    def sizes(layers: int) -> dict[str, int]:
        return stored_bytes(parse_hf_config(config_json(layers)), np.float32)

    one = sum(sizes(1).values())
    layer = sum(sizes(2).values()) - one
    layers = max(1, 1 + round((gigabytes * 1e9 - one) / layer))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_json(layers)))
    shapes = tensor_shapes(layers)
    names = [list(part) for part in np.array_split(np.array(list(shapes)), shards)]
    rng = np.random.default_rng(0)
    weight_map = {}
    for number, part in enumerate(names, 1):
        file = "model.safetensors" if shards == 1 else f"model-{number:05d}-of-{shards:05d}.safetensors"
        tensors = {str(name): rng.random(shapes[name], np.float32) * 0.02 for name in part}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, file))
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum(sizes(layers).values())


def tensor_shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Hugging Face names and shapes of a Qwen2 model with tied embeddings."""
    width, mlp = SIZES["hidden"], SIZES["mlp"]
    kv = width // SIZES["heads"] * SIZES["kv_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (SIZES["vocab"], width)}
    for i in range(layers):
        layer = f"model.layers.{i}."
        for name, rows in (("q", width), ("k", kv), ("v", kv)):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (rows, width)
            shapes[f"{layer}self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{layer}self_attn.o_proj.weight"] = (width, width)
        shapes[f"{layer}mlp.gate_proj.weight"] = shapes[f"{layer}mlp.up_proj.weight"] = (mlp, width)
        shapes[f"{layer}mlp.down_proj.weight"] = (width, mlp)
        shapes[f"{layer}input_layernorm.weight"] = (width,)
        shapes[f"{layer}post_attention_layernorm.weight"] = (width,)
    return shapes | {"model.norm.weight": (width,)}


def load(side: str, folder: str) -> dict[str, int]:
    """In the fresh process: loads the model. Returns the bytes resident before, and at most."""
    prepare, run = (our_load if side == "ours" else peer_load)(folder)
    prepare()
    before = resident("VmRSS")
    held = run()
    peak = resident("VmHWM")
    del held
    return {"before": before, "peak": peak}


def our_load(folder: str) -> tuple[Any, Any]:
    import jax

    from grpo_jax.config import MeshSection
    from grpo_jax.model.hf import inspect_folder, load_params
    from grpo_jax.model.sharding import make_mesh

    def run() -> Any:
        mesh = make_mesh(MeshSection())
        model = inspect_folder(folder)
        return jax.block_until_ready(load_params(model, model.config, mesh))

    return lambda: jax.block_until_ready(jax.numpy.zeros(1) + 1), run


def peer_load(folder: str) -> tuple[Any, Any]:
    import torch
    from transformers import Qwen2ForCausalLM

    def run() -> Any:
        model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            assert all(torch.isfinite(p.sum()) for p in model.parameters())
        return model

    return lambda: torch.zeros(1) + 1, run


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (at most) of this process, bytes."""
    status = Path("/proc/self/status")
    if not status.exists():  # macOS knows the peak only, which is what it was before as well
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
