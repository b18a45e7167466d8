"""CUDA C++ compiled and launched with nothing but what `jax[cuda12]` or `jax[cuda13]` brings: NVRTC and the driver."""

import ctypes as C
import functools
import glob
import importlib
import os
import threading
from collections.abc import Sequence

from robustreg.solvers import ffi

# CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR, and CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES.
_MAJOR, _MINOR, _SHARED = 75, 76, 8
_SYSTEM = ("libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12", "/usr/local/cuda/lib64/libnvrtc.so")


@functools.cache
def library() -> C.CDLL:
    """Load NVRTC: from the wheels of JAX's extras, or from the system.

    Raises:
        OSError: there is none.
    """
    try:
        roots = list(importlib.import_module("nvidia").__path__)  # a namespace package that all NVIDIA wheels fill
    except ImportError:
        roots = []
    found = [path for root in roots for path in sorted(glob.glob(os.path.join(root, "*", "lib", "libnvrtc.so.*")))]
    for path in (*(path for path in found if ".alt." not in path), *_SYSTEM):
        try:
            return C.CDLL(path)
        except OSError:
            continue
    raise OSError("NVRTC was not found: it comes with jax[cuda12] and jax[cuda13], and alone as nvidia-cuda-nvrtc-cu12")


def compile_cubin(source: str, architecture: str, options: Sequence[str] = ()) -> bytes:
    """Compile CUDA C++ to machine code. Needs no GPU.

    Args:
        source: the text.
        architecture: such as "sm_90".
        options: further options of NVRTC.

    Raises:
        OSError: there is no NVRTC.
        RuntimeError: the text does not compile; the message is the compiler's.
    """
    nvrtc, program, size = library(), C.c_void_p(), C.c_size_t()
    _check(nvrtc, nvrtc.nvrtcCreateProgram(C.byref(program), source.encode(), b"robustreg.cu", 0, None, None))
    try:
        arguments = [option.encode() for option in (f"--gpu-architecture={architecture}", "--std=c++17", *options)]
        if nvrtc.nvrtcCompileProgram(program, len(arguments), (C.c_char_p * len(arguments))(*arguments)):
            nvrtc.nvrtcGetProgramLogSize(program, C.byref(size))
            log = C.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"NVRTC for {architecture}: {log.value.decode(errors='replace')}")
        _check(nvrtc, nvrtc.nvrtcGetCUBINSize(program, C.byref(size)))
        cubin = C.create_string_buffer(size.value)
        _check(nvrtc, nvrtc.nvrtcGetCUBIN(program, cubin))
        return cubin.raw
    finally:
        nvrtc.nvrtcDestroyProgram(C.byref(program))


def _check(nvrtc: C.CDLL, code: int) -> None:
    if code:
        nvrtc.nvrtcGetErrorString.restype = C.c_char_p
        raise RuntimeError(f"NVRTC: {nvrtc.nvrtcGetErrorString(code).decode()}")


class Kernel:
    """A kernel of one lane per block, launched on the stream of the program that calls it.

    Args:
        source: CUDA C++ that defines `name` as `extern "C"`, whose arguments are the buffers of a call, in order.
        name: of the kernel.
        threads: of a block.
        shared: bytes of dynamic shared memory.
    """

    def __init__(self, source: str, name: str, threads: int, shared: int = 0):
        self.source, self.name, self.threads, self.shared = source, name, threads, shared
        self._loaded: dict[int, C.c_void_p] = {}
        self._lock = threading.Lock()

    def __call__(self, call: ffi.Call) -> None:
        """Launch it; the results are there when the stream has come so far."""
        driver, context, stream = _driver(), C.c_void_p(), C.c_void_p(call.stream())
        values = [C.c_void_p(address) for address in call.buffers]
        parameters = (C.c_void_p * len(values))(*(C.addressof(value) for value in values))
        size = (C.c_uint(call.lanes), 1, 1, C.c_uint(self.threads), 1, 1, C.c_uint(self.shared))
        _require(driver, driver.cuStreamGetCtx(stream, C.byref(context)))
        _require(driver, driver.cuCtxPushCurrent_v2(context))
        try:
            _require(driver, driver.cuLaunchKernel(self._loaded_here(), *size, stream, parameters, None))
        finally:
            driver.cuCtxPopCurrent_v2(C.byref(context))

    def _loaded_here(self) -> C.c_void_p:
        """The kernel on the current device, compiled at its first use there."""
        driver, device = _driver(), C.c_int()
        _require(driver, driver.cuCtxGetDevice(C.byref(device)))
        with self._lock:
            if device.value not in self._loaded:
                self._loaded[device.value] = self._load(device.value)
            return self._loaded[device.value]

    def _load(self, device: int) -> C.c_void_p:
        driver, major, minor = _driver(), C.c_int(), C.c_int()
        _require(driver, driver.cuDeviceGetAttribute(C.byref(major), _MAJOR, device))
        _require(driver, driver.cuDeviceGetAttribute(C.byref(minor), _MINOR, device))
        cubin = compile_cubin(self.source, f"sm_{major.value}{minor.value}")
        module, function = C.c_void_p(), C.c_void_p()
        _require(driver, driver.cuModuleLoadData(C.byref(module), cubin))
        _require(driver, driver.cuModuleGetFunction(C.byref(function), module, self.name.encode()))
        if self.shared:
            _require(driver, driver.cuFuncSetAttribute(function, _SHARED, self.shared))
        return function


@functools.cache
def _driver() -> C.CDLL:
    return C.CDLL("libcuda.so.1")


def _require(driver: C.CDLL, code: int) -> None:
    if code:
        text = C.c_char_p()
        driver.cuGetErrorString(code, C.byref(text))
        raise RuntimeError(f"CUDA: {text.value.decode() if text.value else f'error {code}'}")
