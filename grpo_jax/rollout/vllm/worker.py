"""The engine's end of a push: a back end of vLLM's weight-transfer API, loaded into each of its workers.

vLLM knows how its own parameters (fused, split over tensor-parallel ranks) are filled from Hugging Face tensors.
This is recorded once: vLLM's `load_weights` is run on tensors without data, and every copy that it would make
is written down (`record_load_plan`). A push replays those copies from the bucket into the live parameters. So
there is no second copy of any tensor, none of vLLM's loaders runs, and CPU and GPU do the same. The plan run
backwards reads the parameters out again, and their checksums are compared with the trainer's.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.platforms import current_platform

from grpo_jax.rollout.vllm.adapters import adapter_request
from grpo_jax.weight_sync.host import HostReceiver
from grpo_jax.weight_sync.ipc import IpcReceiver
from grpo_jax.weight_sync.nccl import NcclReceiver
from grpo_jax.weight_sync.wire import (
    BLOCK_WORDS,
    WORD_WEIGHTS,
    Layout,
    Piece,
    WeightSyncError,
    deadline_check,
    piece_checksums,
    wait_for_device,
)

BACKEND = "grpo_jax"
RECEIVERS: dict[str, Any] = {"ipc": IpcReceiver, "nccl": NcclReceiver, "host": HostReceiver}
SLAB_BLOCKS = 8192  # 32 MiB of a bucket are summed at once

if current_platform.is_cpu():
    # oneDNN would keep packed copies of the weights, and a push would never reach that of a tied output head.
    import vllm._custom_ops as custom_ops

    custom_ops._supports_onednn = False

    from grpo_jax.rollout.vllm.cpu_experts import keep_experts_as_loaded

    keep_experts_as_loaded()

EXPERT_LAYOUTS = {"TRITON", "BATCHED_TRITON", "CPU"}
"""vLLM's back ends for experts that keep them as they are loaded."""


@dataclasses.dataclass(frozen=True)
class Copy:
    """One copy that vLLM makes when it loads a tensor: from a view of the tensor to `target`."""

    target: torch.Tensor
    offset: int
    """Elements from the start of the tensor, or of the piece once it is placed in a bucket."""
    size: tuple[int, ...]
    stride: tuple[int, ...]


LoadPlan = dict[str, list[Copy]]
"""Hugging Face name -> the copies that load it."""


@contextlib.contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """Has the layers of a model in the places of vLLM's wrappers that add adapters to them."""
    wrapped = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if hasattr(child, "base_layer")
    ]
    for parent, name, child in wrapped:
        parent._modules[name] = child.base_layer
    try:
        yield
    finally:
        for parent, name, child in wrapped:
            parent._modules[name] = child


class CopyRecorder(TorchDispatchMode):
    """Records the copies out of the given tensors instead of making them."""

    def __init__(self, sources: dict[str, torch.Tensor]):
        super().__init__()
        self._names = {tensor.untyped_storage()._cdata: name for name, tensor in sources.items()}
        self._joined: dict[int, tuple[torch.Tensor, list[torch.Tensor]]] = {}
        """Storage -> (what tensors were joined into, row after row; those tensors)."""
        self.plan: LoadPlan = {name: [] for name in sources}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten.copy_.default and args[1].device.type == "meta":
            for target, source in self._parts(args[0], args[1]):
                name = self._names.get(source.untyped_storage()._cdata)
                if name is None:
                    raise WeightSyncError(
                        "the engine computes with weights while it loads them: not supported"
                    )
                copy = Copy(target, int(source.storage_offset()), tuple(source.size()), source.stride())
                self.plan[name].append(copy)
            return args[0]
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.cat.default and args[1:] in ((), (0,)) and result.device.type == "meta":
            self._joined[result.untyped_storage()._cdata] = result, args[0]
        return result

    def _parts(self, target: torch.Tensor, source: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Returns (target, source) of a copy, or of the copies that do the same without joining tensors."""
        joined, parts = self._joined.get(source.untyped_storage()._cdata, (None, []))
        if joined is None or joined.shape != source.shape:
            return [(target, source.expand(target.shape))]
        return list(zip(target.split([len(part) for part in parts]), parts, strict=True))


def record_load_plan(model: Any, layout: Layout) -> LoadPlan:
    """Records how a vLLM model loads the tensors of `layout`. Its parameters are not changed.

    Raises:
        WeightSyncError: the model does not load one of the tensors, or no tensor fills one of its parameters.
    """
    for name, module in model.named_modules():
        backend = getattr(getattr(module, "quant_method", None), "unquantized_backend", None)
        if backend is not None and backend.name not in EXPERT_LAYOUTS:
            rule = (
                f"the engine keeps the experts {name} in a layout of {backend.value}, not as they are loaded"
            )
            raise WeightSyncError(f"{rule}: rollout.engine_args moe_backend=triton does")
    dtype = getattr(torch, layout.dtype)
    sources = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in layout.tensors.items()}
    recorder = CopyRecorder(sources)
    with torch.no_grad(), recorder:
        model.load_weights(iter(sources.items()))
    for name, copies in recorder.plan.items():
        if not copies:
            raise WeightSyncError(f"the engine does not load tensor {name}: is it of the trainer's model?")
    filled: dict[int, int] = {}
    for copy in (copy for copies in recorder.plan.values() for copy in copies):
        storage = copy.target.untyped_storage().data_ptr()
        filled[storage] = filled.get(storage, 0) + copy.target.numel()
    for name, parameter in model.named_parameters():
        missing = parameter.numel() - filled.get(parameter.untyped_storage().data_ptr(), 0)
        # A vocabulary is padded to a multiple of 64 rows for each rank. The padding is never read.
        is_vocabulary = name.endswith(("embed_tokens.weight", "lm_head.weight"))
        if missing and (not is_vocabulary or missing == parameter.numel()):
            raise WeightSyncError(f"no tensor fills {missing} elements of the engine's parameter {name}")
    return recorder.plan


def place_copies(plan: LoadPlan, piece: Piece, shape: tuple[int, ...], itemsize: int) -> list[Copy]:
    """Returns the copies out of one piece of a bucket. Offsets count from the start of the bucket.

    Raises: WeightSyncError: the piece is not a whole tensor, and vLLM does not load that tensor row by row.
    """
    start = piece.offset // itemsize
    if piece.num_rows == shape[0]:
        return [dataclasses.replace(copy, offset=start + copy.offset) for copy in plan[piece.name]]
    placed = []
    width = math.prod(shape[1:])
    for copy in plan[piece.name]:
        if width not in copy.stride:
            raise WeightSyncError(f"the engine does not load tensor {piece.name} by rows: not supported")
        axis = copy.stride.index(width)
        row, column = divmod(copy.offset, width)  # where it begins
        low = max(row, piece.first_row)
        count = min(row + copy.size[axis], piece.first_row + piece.num_rows) - low
        if count > 0:
            offset = start + (low - piece.first_row) * width + column
            size = (*copy.size[:axis], count, *copy.size[axis + 1 :])
            placed.append(Copy(copy.target.narrow(axis, low - row, count), offset, size, copy.stride))
    return placed


def block_sums(bucket: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The inner sums of `wire.piece_checksums`, mod 2^32.

    Args:
        bucket: [n] uint8.
        weights: `WORD_WEIGHTS` as int32 on the same device.

    Returns:
        [n / BLOCK_BYTES] int64.
    """
    words = bucket.view(torch.int32).view(-1, BLOCK_WORDS)
    sums = [(slab * weights).sum(dim=1, dtype=torch.int64) for slab in words.split(SLAB_BLOCKS)]
    return torch.cat(sums) & 0xFFFFFFFF


@dataclasses.dataclass
class InitInfo(WeightTransferInitInfo):
    """Sent once, before the first push."""

    transport: str
    link: dict[str, Any]
    layout: dict[str, Any]
    is_adapter: bool = False
    """The tensors are an adapter's: none of the model's parameters."""


@dataclasses.dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Sent with each push."""

    timeout_s: float


class PushReceiver(WeightTransferEngine):
    """Fills the live parameters of one worker."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Records the load plan and opens the worker's end of the transport, in place of an earlier one."""
        self.shutdown()
        self.layout = Layout.from_dict(init_info.layout)
        self._dtype = getattr(torch, self.layout.dtype)
        self.adapter: torch.Tensor | None = None
        """The buckets of an adapter one after the other, as they have arrived."""
        self._copies = self._adapter_copies() if init_info.is_adapter else self._model_copies()
        self._weights = torch.from_numpy(WORD_WEIGHTS.view(np.int32)).to(self.device)
        self._is_whole = init_info.is_adapter or self.parallel_config.tensor_parallel_size == 1
        self.checksums: list[list[int]] = []
        receiver = RECEIVERS[init_info.transport]
        self._receiver = receiver(init_info.link, self.parallel_config.rank, self.device)

    def _model_copies(self) -> list[list[Copy]]:
        """The copies out of each bucket into the model's parameters."""
        with without_adapters(self.model):
            plan = record_load_plan(self.model, self.layout)
        return [
            [
                copy
                for piece in pieces
                for copy in place_copies(plan, piece, self.layout.tensors[piece.name], self._dtype.itemsize)
            ]
            for pieces in self.layout.buckets
        ]

    def _adapter_copies(self) -> list[list[Copy]]:
        """One copy out of each bucket, into `adapter`."""
        sizes = [num_bytes // self._dtype.itemsize for num_bytes in self.layout.sizes]
        self.adapter = torch.zeros(sum(sizes), dtype=self._dtype, device=self.device)
        return [[Copy(part, 0, tuple(part.size()), part.stride())] for part in self.adapter.split(sizes)]

    def start_weight_update(self) -> None:
        """Nothing to do: parameters are filled in place."""

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Takes all buckets of one push, and computes checksums.

        A worker that holds whole parameters reads them out again and sums them. One that holds parts of them sums
        what has arrived.
        """
        check = deadline_check(update_info.timeout_s, "the trainer's weights did not arrive")
        try:
            self.checksums = self._receive(check)
        except BaseException:
            self.shutdown()  # where NCCL waits on the device, nothing else ends that
            raise

    def _receive(self, check: Callable[[], None]) -> list[list[int]]:
        sums = []
        with torch.no_grad():
            for number, (bucket, release) in enumerate(self._receiver.buckets(self.layout, check)):
                targets, sources = self._pairs(number, bucket)
                torch._foreach_copy_(targets, sources)
                if not self._is_whole:
                    sums.append(block_sums(bucket, self._weights))
                release()
                if self._is_whole:  # the parameters are read while the next bucket is on its way
                    sums.append(block_sums(self._read_out(number, bucket), self._weights))
        ends = np.cumsum([len(blocks) for blocks in sums])[:-1]
        together = torch.cat(sums)
        wait_for_device(self.device, check)
        on_host = np.split(together.cpu().numpy(), ends)
        return [
            piece_checksums(blocks, pieces)
            for blocks, pieces in zip(on_host, self.layout.buckets, strict=True)
        ]

    def _pairs(self, number: int, bucket: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Returns views of the parameters, and the views of the bucket that are copied into them."""
        typed = bucket.view(self._dtype)
        start, copies = typed.storage_offset(), self._copies[number]
        views = [typed.as_strided(copy.size, copy.stride, start + copy.offset) for copy in copies]
        return [copy.target for copy in copies], views

    def _read_out(self, number: int, like: torch.Tensor) -> torch.Tensor:
        """Returns the bucket as the parameters now hold it. Its padding is 0, as the trainer's is."""
        out = torch.zeros_like(like)
        targets, views = self._pairs(number, out)
        torch._foreach_copy_(views, targets)
        return out

    def finish_weight_update(self) -> None:
        """Nothing to do: see `start_weight_update`."""

    def shutdown(self) -> None:
        """Closes the worker's end of the transport."""
        if receiver := getattr(self, "_receiver", None):
            receiver.close()
            del self._receiver

    @staticmethod
    def trainer_send_weights(iterator: Iterator[Any], trainer_args: Any) -> None:
        """Never called; vLLM 0.25 wants a back end to have it. The senders of `grpo_jax.weight_sync` send."""
        raise NotImplementedError("grpo_jax.weight_sync sends")


class WorkerExtension:
    """Mixed into vLLM's worker class; naming it makes each worker import this module before the model loads."""

    weight_transfer_engine: Any
    device: Any
    get_model: Any
    model_runner: Any

    def grpo_jax_checksums(self) -> list[list[int]]:
        """Checksums of the last push, in the order of the buckets and their pieces."""
        return self.weight_transfer_engine.checksums

    def grpo_jax_take_adapter(
        self, number: int, rank: int, alpha: float, num_kept: int, timeout_s: float
    ) -> list[list[int]]:
        """Takes an adapter that the trainer sends meanwhile, and keeps it beside those of earlier versions.

        Args: number: vLLM's of this one; rank, alpha: of `lora`; num_kept: how many are kept, the last ones.
        Returns: its checksums, as `grpo_jax_checksums`.
        """
        engine, lora_manager = self.weight_transfer_engine, self.model_runner.lora_manager
        engine.receive_weights(UpdateInfo(timeout_s))
        if not hasattr(self, "_grpo_jax_slots"):
            from grpo_jax.rollout.vllm.adapter_slots import AdapterSlots

            self._grpo_jax_slots = AdapterSlots(lora_manager, engine.layout, rank, alpha)
        self._grpo_jax_slots.keep(number, engine.adapter.clone(), num_kept)
        lora_manager.add_adapter(adapter_request(number))
        return engine.checksums

    def grpo_jax_disconnect(self) -> None:
        """Closes the worker's end of the transport of the weights."""
        if self.weight_transfer_engine is not None:
            self.weight_transfer_engine.shutdown()

    def grpo_jax_head_dtype(self) -> str:
        """What the output head is computed in; "" where this vLLM has no setting for it."""
        dtype = getattr(getattr(self.get_model(), "logits_processor", None), "head_dtype", None)
        return "" if dtype is None else str(dtype).removeprefix("torch.")

    def grpo_jax_memory(self) -> int:
        """Largest number of bytes since the last call by which PyTorch held more than it does now; 0 on a CPU."""
        if self.device.type != "cuda":
            return 0
        peak = torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return peak


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, PushReceiver)
