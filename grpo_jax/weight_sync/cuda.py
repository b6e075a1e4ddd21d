"""The few calls of NVIDIA's driver that sharing a buffer between processes needs, through ctypes.

JAX cannot export its memory to another process (cuIpcGetMemHandle refuses what XLA's allocator hands out), and
neither end should need the other's framework: libcuda.so.1 is wherever the driver is.
"""

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator

from grpo_jax.weight_sync.wire import poll

NOT_READY = 600  # CUDA_ERROR_NOT_READY


class CudaError(RuntimeError):
    """A call of the CUDA driver failed."""


class _IpcHandle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * 64),)


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL("libcuda.so.1")
    library.cuIpcOpenMemHandle_v2.argtypes = [ctypes.POINTER(ctypes.c_uint64), _IpcHandle, ctypes.c_uint]
    call("cuInit", 0, library=library)
    return library


def call(name: str, *args: object, library: ctypes.CDLL | None = None) -> None:
    """Calls a function of the driver. Raises CudaError: it returned an error."""
    library = library or _library()
    code = getattr(library, name)(*args)
    if code:
        text = ctypes.c_char_p()
        library.cuGetErrorString(code, ctypes.byref(text))
        raise CudaError(f"{name}: {(text.value or b'unknown error').decode()} ({code})")


@contextlib.contextmanager
def on_device(ordinal: int) -> Iterator[None]:
    """Makes the device's primary context, the one that JAX and PyTorch use, current for this thread."""
    context = ctypes.c_void_p()
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), _device(ordinal))
    call("cuCtxPushCurrent_v2", context)
    try:
        yield
    finally:
        call("cuCtxPopCurrent_v2", ctypes.byref(context))


def _device(ordinal: int) -> ctypes.c_int:
    device = ctypes.c_int()
    call("cuDeviceGet", ctypes.byref(device), ordinal)
    return device


def device_uuid(ordinal: int) -> str:
    """Names the physical device, whatever numbers a process sees; hexadecimal."""
    uuid = (ctypes.c_ubyte * 16)()
    call("cuDeviceGetUuid_v2", ctypes.byref(uuid), _device(ordinal))
    return bytes(uuid).hex()


def device_bytes(ordinal: int) -> int:
    """All memory of a device."""
    num_bytes = ctypes.c_size_t()
    call("cuDeviceTotalMem_v2", ctypes.byref(num_bytes), _device(ordinal))
    return num_bytes.value


def supported_cuda() -> str:
    """The newest CUDA that the driver supports, as "12.8"; "": there is no driver. Touches no device."""
    version = ctypes.c_int()
    try:
        code = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return ""
    return "" if code else f"{version.value // 1000}.{version.value % 1000 // 10}"


class SharedBuffer:
    """Device memory that another process can open. cuMemAlloc's, which can be exported."""

    def __init__(self, ordinal: int, num_bytes: int):
        self._ordinal, self._pointer = ordinal, ctypes.c_uint64()
        with on_device(ordinal):
            call("cuMemAlloc_v2", ctypes.byref(self._pointer), ctypes.c_size_t(num_bytes))
            handle = _IpcHandle()
            try:
                call("cuIpcGetMemHandle", ctypes.byref(handle), self._pointer)
            except CudaError:
                self.close()
                raise
        self.handle = bytes(handle).hex()

    def copy_from(self, pointer: int, num_bytes: int, offset: int, check: Callable[[], None]) -> None:
        """Copies from device memory of this process and waits for it."""
        with on_device(self._ordinal):
            target = ctypes.c_uint64(self._pointer.value + offset)
            call("cuMemcpyDtoD_v2", target, ctypes.c_uint64(pointer), ctypes.c_size_t(num_bytes))
            wait_for_stream(None, check)

    def close(self) -> None:
        with on_device(self._ordinal):
            call("cuMemFree_v2", self._pointer)


def open_shared(ordinal: int, handle: str) -> int:
    """Returns the address, in this process, of a `SharedBuffer` of another one on the same device."""
    pointer, raw = ctypes.c_uint64(), _IpcHandle.from_buffer_copy(bytes.fromhex(handle))
    with on_device(ordinal):
        call("cuIpcOpenMemHandle_v2", ctypes.byref(pointer), raw, 1)  # 1: the only flag, peer access
    return int(pointer.value)


def close_shared(ordinal: int, pointer: int) -> None:
    with on_device(ordinal):
        call("cuIpcCloseMemHandle", ctypes.c_uint64(pointer))


def wait_for_stream(stream: ctypes.c_void_p | None, check: Callable[[], None]) -> None:
    """Waits until a stream is idle; `check` raises where waiting has no more sense. None: the default stream."""
    poll(lambda: _library().cuStreamQuery(stream) != NOT_READY, check)
    call("cuStreamQuery", stream)  # fails with the stream's error
