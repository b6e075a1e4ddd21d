"""A workload that every trainer can run: a random model of a real shape, a tokenizer, prompts of an exact length.

Nothing is downloaded, and nothing is learnt from it: it is for measuring time and memory.
"""

import json
import math
import struct
from pathlib import Path
from typing import Any

import engine_common
import numpy as np

BLOCK = 2**24 - 3
"""Random numbers that all weights repeat. A prime: no two rows of a matrix begin at the same one."""
INIT_STD = 0.02
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def write_model(folder: Path, shape: str) -> Path:
    """A Hugging Face folder with random bfloat16 weights, a tokenizer and stop ids; kept if it is there."""
    if (folder / "model.safetensors").exists():
        return folder
    engine_common.write_shape(folder, shape)
    ids = write_tokenizer(folder, engine_common.SHAPES[shape]["vocab_size"])
    config = json.loads((folder / "config.json").read_text()) | ids
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "generation_config.json").write_text(json.dumps(ids))
    write_weights(folder)
    return folder


def write_weights(folder: Path) -> None:
    """model.safetensors of the shape in config.json, written as it is drawn: no tensor is held in memory.

    Normal numbers for matrices, ones for norms, zeros for biases, as transformers begins a Qwen2.
    """
    import ml_dtypes

    from grpo_jax.model.config import parse_hf_config
    from grpo_jax.model.tensors import each_tensor, tensor_shape

    config = parse_hf_config(json.loads((folder / "config.json").read_text()))
    shapes = {name: tensor_shape(spec, shape) for spec, name, _, shape in each_tensor(config)}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8 bytes
    normal = np.random.default_rng(0).standard_normal(BLOCK, np.float32)
    block = (INIT_STD * normal).astype(ml_dtypes.bfloat16).view(np.uint16)
    partial, at = folder / "model.partial", 0
    with partial.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            left = math.prod(shape)
            if len(shape) == 1:
                value = 0 if name.endswith("bias") else 1
                file.write(np.full(left, value, ml_dtypes.bfloat16).tobytes())
                continue
            while left:
                piece = block[at : at + left]
                piece.tofile(file)
                left, at = left - len(piece), (at + len(piece)) % BLOCK
    partial.rename(folder / "model.safetensors")


def write_tokenizer(folder: Path, vocab_size: int) -> dict[str, int]:
    """A byte-level tokenizer without merges: a character of ASCII is a token. Ids beyond the bytes are fillers.

    Every id of the model decodes to something, and a text has as many tokens as letters. Qwen2's parts and
    chat template, since `AutoTokenizer` takes them for any folder that says qwen2.

    Returns: the ids that the model's configuration names.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

    from grpo_jax.model.random_model import CHAT_TEMPLATE, END, PAD, START

    names = [PAD, START, END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += [f"<{i}>" for i in range(len(names), vocab_size)]
    qwen2 = Qwen2Tokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.normalizer = qwen2.normalizer
    tokenizer.pre_tokenizer = qwen2.pre_tokenizer
    tokenizer.decoder = qwen2.decoder
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return {"bos_token_id": 0, "eos_token_id": names.index(END), "pad_token_id": 0}


def write_prompts(file: Path, model: Path, *, num_prompts: int, prompt_tokens: int) -> None:
    """A Parquet file of different prompts, each of exactly `prompt_tokens` tokens with the chat template."""
    from grpo_jax.data.prompts import encode_prompts, load_tokenizer
    from grpo_jax.data.schema import read_rows, write_rows

    def row(index: int, content: str) -> dict[str, Any]:
        return {
            "data_source": "random",
            "prompt": [{"role": "user", "content": content}],
            "ability": "none",
            "reward_model": {"style": "rule", "ground_truth": "0"},
            "extra_info": {"index": index},
        }

    def lengths() -> set[int]:
        settings: dict[str, Any] = dict(max_prompt_length=2**30, overlong="filter", key="--prompt_tokens")
        prompts, _ = encode_prompts(read_rows([file], "--prompt_tokens"), load_tokenizer(model), **settings)
        return {len(prompt.token_ids) for prompt in prompts}

    write_rows(file, [row(0, "a")])
    template = lengths().pop() - 1
    letters = prompt_tokens - template
    if letters < 8:
        raise SystemExit(
            f"--prompt_tokens must be at least {template + 8}: the chat template takes {template}"
        )
    rng = np.random.default_rng(0)
    texts = ("".join(rng.choice(list(LETTERS), letters)) for _ in range(num_prompts))
    write_rows(file, [row(i, text) for i, text in enumerate(texts)])
    assert lengths() == {prompt_tokens}, lengths()
