"""Device memory through the library of the CUDA driver: running an engine needs neither torch nor another package."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np

from fluxc.errors import TargetError

LIBRARY = "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # attributes of a device, as cuda.h numbers them
_HINT = "run the engine on a machine with an NVIDIA GPU, or export --target onnx for this one"


class CudaDriver:
    """One device, its primary context and a stream. Raises TargetError where there is no driver or no such device."""

    def __init__(self, device: int = 0, library: Any = None) -> None:
        self._cuda = library or _open()
        self._context = ctypes.c_void_p()
        self._device = handle = ctypes.c_int()
        if self._cuda.cuInit(0):
            raise TargetError("the CUDA driver finds no device", hint=_HINT)
        if self._cuda.cuDeviceGet(ctypes.byref(handle), device):
            raise TargetError(f"there is no CUDA device {device}", hint=_HINT)
        self._check("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), handle)
        self._check("cuCtxSetCurrent", self._context)
        stream = ctypes.c_void_p()
        self._check("cuStreamCreate", ctypes.byref(stream), 0)
        self.stream: int = stream.value or 0

    def capability(self) -> tuple[int, int]:
        """The device's compute capability."""
        return self._attribute(_MAJOR), self._attribute(_MINOR)

    def use(self) -> None:
        """Make the device the calling thread's."""
        self._check("cuCtxSetCurrent", self._context)

    @contextlib.contextmanager
    def buffer(self, size: int) -> Iterator[int]:
        """The address of `size` bytes on the device, freed at the end."""
        address = ctypes.c_uint64()
        self._check("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(size, 1)))
        try:
            yield address.value
        finally:
            self._check("cuMemFree_v2", address)

    def upload(self, address: int, array: np.ndarray) -> None:
        """Copy a contiguous array to the device."""
        self._check("cuMemcpyHtoD_v2", ctypes.c_uint64(address), _pointer(array), ctypes.c_size_t(array.nbytes))

    def download(self, array: np.ndarray, address: int) -> None:
        """Fill a contiguous array from the device."""
        self._check("cuMemcpyDtoH_v2", _pointer(array), ctypes.c_uint64(address), ctypes.c_size_t(array.nbytes))

    def wait(self) -> None:
        """Return when all work of the stream is done."""
        self._check("cuStreamSynchronize", ctypes.c_void_p(self.stream))

    def _attribute(self, number: int) -> int:
        value = ctypes.c_int()
        self._check("cuDeviceGetAttribute", ctypes.byref(value), number, self._device)
        return value.value

    def _check(self, name: str, *arguments: Any) -> None:
        code = getattr(self._cuda, name)(*arguments)
        if code:
            raise TargetError(f"the CUDA driver refused {name} (error {code})", hint="`fluxc doctor` says what is here")


def _open() -> Any:
    try:
        return ctypes.CDLL(LIBRARY)
    except OSError as cause:
        raise TargetError(
            "a TensorRT engine needs an NVIDIA GPU, and no CUDA driver is installed", hint=_HINT
        ) from cause


def _pointer(array: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)
