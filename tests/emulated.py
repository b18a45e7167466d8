"""The CUDA kernel on a CPU: the same text, compiled by g++, called by the same handler from inside `jit`."""

import ctypes
import hashlib
import subprocess
import threading
from pathlib import Path

SOURCE = Path(__file__).with_name("emulate.cpp")


class Emulated:
    """A carrier of kernels, to be put in the place of `robustreg.resident.carrier`'s.

    Args:
        folder: where compiled kernels are kept.
    """

    platform, target = "cpu", "cpu"

    def __init__(self, folder):
        self.folder = folder

    def kernel(self, sizes):
        """The kernel for these sizes."""
        text = sizes.source()
        name = Path(self.folder) / hashlib.sha256(text.encode()).hexdigest()[:16]
        kernel, library = name.with_suffix(".cu"), name.with_suffix(".so")
        kernel.write_text(text)
        command = ["g++", "-O1", "-std=c++20", "-shared", "-fPIC", "-w", f'-DKERNEL="{kernel}"', str(SOURCE)]
        subprocess.run([*command, "-o", str(library)], check=True, capture_output=True, text=True)
        launch, lock = ctypes.CDLL(str(library)).launch, threading.Lock()

        def run(call):
            with lock:
                launch((ctypes.c_void_p * len(call.buffers))(*call.buffers), ctypes.c_int(call.lanes))

        return run
