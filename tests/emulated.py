"""The CUDA kernel on a CPU: the same text, compiled by g++, called by the same handler from inside `jit`."""

import ctypes
import hashlib
import subprocess
import threading
from pathlib import Path

SOURCE, DRIVER = (Path(__file__).with_name(name) for name in ("emulate.cpp", "driver.cpp"))


class Emulated:
    """A carrier of kernels, to be put in the place of `robustreg.solvers.resident_kernel.carrier`'s.

    Args:
        folder: where compiled kernels are kept.
    """

    platform, target = "cpu", "cpu"

    def __init__(self, folder):
        self.folder = folder

    def kernel(self, sizes):
        """The kernel for these sizes."""
        launch, lock = self.library(sizes, SOURCE).launch, threading.Lock()

        def run(call):
            with lock:
                launch((ctypes.c_void_p * len(call.buffers))(*call.buffers), ctypes.c_int(call.lanes))

        return run

    def driver(self, sizes):
        """A CUDA driver whose only kernel is that for these sizes."""
        return self.library(sizes, DRIVER)

    def library(self, sizes, main):
        """A C++ file compiled around the kernel."""
        text = sizes.source()
        name = Path(self.folder) / (main.stem + hashlib.sha256(text.encode()).hexdigest()[:16])
        kernel, library = name.with_suffix(".cu"), name.with_suffix(".so")
        kernel.write_text(text)
        names = [f'-DKERNEL="{kernel}"', f'-DKERNEL_LIBRARY="{SOURCE}"']
        command = ["g++", "-O1", "-std=c++20", "-shared", "-fPIC", "-w", *names, str(main), "-o", str(library)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return ctypes.CDLL(str(library))
