"""Tiny models of every family, and the opposite of packing, written from the layout's description alone."""

import dataclasses
import math

import jax
import ml_dtypes
import numpy as np
import torch
from tiny_models import save_tiny_model

from grpo_jax.config import MeshSection
from grpo_jax.model.hf import inspect_folder, load_params
from grpo_jax.model.sharding import make_mesh
from grpo_jax.weight_sync.buckets import make_push_plan, pack_buckets

NUM_LAYERS = 5
VOCAB = 130
# Axes that 8 devices divide (hidden size), that only some meshes divide, and a vocabulary that rows do not.
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=NUM_LAYERS,
    eos_token_id=2,
    pad_token_id=0,
)
FAMILIES = {
    "qwen2-tied": ("qwen2", dict(SIZES, tie_word_embeddings=True)),
    "qwen2-untied": ("qwen2", dict(SIZES, tie_word_embeddings=False)),
    "qwen3": ("qwen3", dict(SIZES, head_dim=16, tie_word_embeddings=False)),
    "llama": ("llama", dict(SIZES, head_dim=8, tie_word_embeddings=False)),
}
NUMPY_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
LAYER_BLOCKS = 15
"""4,096-byte blocks of a Qwen2 layer in float32: q, k, v, their biases and o (1 each), gate, up and down (48 x 32
float32 are 1.5, hence 2 each), two norms (1 each)."""


class Model:
    """One random model: transformers' tensors, the folder, and its parameters on any mesh."""

    def __init__(self, family, folder):
        kind, sizes = FAMILIES[family]
        model = save_tiny_model(folder, kind, seed=sum(map(ord, family)), **sizes)
        self.tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        self.folder = inspect_folder(folder)
        self.config = self.folder.config
        if self.config.tie_embeddings:
            del self.tensors["lm_head.weight"]  # the embedding under another name
        self._params = {}

    def params(self, *sizes):
        if sizes not in self._params:
            self._params[sizes] = load_params(self.folder, self.config, mesh_of(*sizes))
        return self._params[sizes]

    def push(self, bucket_bytes, dtype="float32", sizes=(1, 1, 1), num_parts=1):
        """(plan, flat arrays, block sums)"""
        config = dataclasses.replace(self.config, dtype=NUMPY_DTYPES[dtype])
        plan = make_push_plan(config, bucket_bytes, num_parts=num_parts)
        packed = list(pack_buckets(self.params(*sizes), plan, mesh_of(*sizes)))
        assert [bucket for bucket, _, _ in packed] == list(plan.buckets)
        return plan, [flat for _, flat, _ in packed], [blocks for _, _, blocks in packed]

    def expected(self, dtype):
        """Name -> (shape, bytes), as transformers has them."""
        cast = {name: tensor.to(getattr(torch, dtype)) for name, tensor in self.tensors.items()}
        return {name: (tuple(t.shape), bits(t)) for name, t in cast.items()}


def bits(tensor):
    """The bytes of a torch tensor; numpy does not know its bfloat16."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def mesh_of(data, fsdp, tensor):
    count = math.prod((data, fsdp, tensor))
    return make_mesh(MeshSection(data, fsdp, tensor), jax.devices()[:count])


def raw(flat):
    """The bytes of an array, [n] uint8."""
    return np.frombuffer(np.asarray(flat).tobytes(), np.uint8)


def unpack(layout, flats):
    """Name -> (shape, bytes) of what lies in the buckets. Every row has to be there, once, and nothing beside."""
    dtype = NUMPY_DTYPES[layout.dtype]
    tensors = {name: np.zeros(shape, dtype) for name, shape in layout.tensors.items()}
    times = {name: np.zeros(shape[0], int) for name, shape in layout.tensors.items()}
    for pieces, flat in zip(layout.buckets, flats, strict=True):
        rest = raw(flat).copy()
        for piece in pieces:
            taken = slice(piece.offset, piece.offset + piece.num_bytes)
            shape = (piece.num_rows, *layout.tensors[piece.name][1:])
            rows = slice(piece.first_row, piece.first_row + piece.num_rows)
            tensors[piece.name][rows] = rest[taken].view(dtype).reshape(shape)
            times[piece.name][rows] += 1
            rest[taken] = 0
        assert not rest.any(), "padding has to be 0: the receiver fills it with that before it sums"
    assert all((count == 1).all() for count in times.values())
    return {name: (tensor.shape, tensor.tobytes()) for name, tensor in tensors.items()}


def checksums_by_hand(raw_bytes, pieces):
    """The formula of `wire.piece_checksums`, with both sums written out, from the bytes of a bucket."""
    words = raw_bytes.view("<u4").astype(np.uint64).reshape(-1, 1024)
    inner = (words * np.arange(1, 2049, 2, dtype=np.uint64)).sum(axis=1)  # below 2^32 * 2^20
    result = []
    for piece in pieces:
        blocks = range(piece.offset // 4096, -(-(piece.offset + piece.num_bytes) // 4096))
        result.append(sum((2 * k + 1) * int(inner[k]) for k in blocks) % 2**32)
    return result
