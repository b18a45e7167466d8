"""The CUDA kernel compiles for every card without one, and asks of a driver what it should."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import emulated
import jax
import numpy as np
import pytest

from robustreg.solvers import ffi, nvrtc, resident_kernel

SIZES = resident_kernel.Sizes(256, 4, 5, 5, True, False, 7.0, False, False, False, False, 200, 0.1)
VARIANTS = {
    "grid": SIZES,
    "large grid": SIZES._replace(states=1024, ends=True, state_prior=True),
    "alpha": SIZES._replace(alpha=True, state_beta=True),
    "lists": SIZES._replace(states=500, actions=8, slots=8, entries=64, joint=False),
    "dense": SIZES._replace(states=64, slots=64, entries=64, dense=True),
    "long dense": SIZES._replace(states=128, slots=128, entries=128, dense=True),
}


@pytest.mark.parametrize("architecture", ("sm_80", "sm_90", "sm_100"))
@pytest.mark.parametrize("variant", VARIANTS)
def test_source_compiles(variant, architecture):
    """For Ampere, Hopper and Blackwell, without a card."""
    try:
        nvrtc.library()
    except OSError as missing:
        pytest.skip(str(missing))
    cubin = nvrtc.compile_cubin(VARIANTS[variant].source(), architecture)
    assert cubin[:4] == b"\x7fELF"


def test_the_launch(tmp_path, monkeypatch):
    """What the driver is asked to do, in order: it is played by one that refuses everything else."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed: there is no driver to play")
    try:
        nvrtc.library()
    except OSError as missing:
        pytest.skip(str(missing))
    sizes = SIZES._replace(states=20)
    driver = emulated.Emulated(tmp_path).driver(sizes)
    monkeypatch.setattr(nvrtc, "_driver", lambda: driver)
    kernel = nvrtc.Kernel(sizes.source(), "solve", sizes.threads)
    arguments, value = resident_kernel.trial(sizes)
    found = [np.zeros((2, 20), np.float32), *(np.zeros(2, t) for t in (*[np.float32] * 3, *[np.int32] * 3))]
    buffers = [x.ctypes.data for x in (*arguments, *found)]
    for _ in range(2):
        kernel(ffi.Call(buffers, 2, lambda: 0x5678))
    assert (driver.times_loaded(), driver.still_pushed()) == (1, 0)
    np.testing.assert_array_equal(found[5], 0)
    assert (np.abs(found[0].astype(float) + found[1][:, None] - value) <= found[2][:, None]).all()
    with pytest.raises(RuntimeError, match="refused"):
        kernel(ffi.Call(buffers, 2, lambda: 0x1111))
    assert driver.still_pushed() == 0


OFFSETS = """
#include <cstddef>
#include <cstdio>
#include "xla/ffi/api/c_api.h"
#define SHOW(type, field) std::printf("%zu ", offsetof(XLA_FFI_##type, field))
int main() {
  SHOW(Api, api_version), SHOW(Api, internal_api), SHOW(Api, XLA_FFI_Error_Create), SHOW(Api, XLA_FFI_Stream_Get);
  SHOW(Buffer, dtype), SHOW(Buffer, data), SHOW(Buffer, rank), SHOW(Buffer, dims);
  SHOW(Args, size), SHOW(Args, types), SHOW(Args, args), SHOW(Rets, size), SHOW(Rets, rets);
  SHOW(CallFrame, api), SHOW(CallFrame, ctx), SHOW(CallFrame, stage), SHOW(CallFrame, args), SHOW(CallFrame, rets);
  SHOW(Metadata, api_version), SHOW(Metadata_Extension, metadata);
  SHOW(Error_Create_Args, message), SHOW(Error_Create_Args, errc);
  SHOW(Stream_Get_Args, ctx), SHOW(Stream_Get_Args, stream);
}
"""


def test_structures_are_those_of_the_header(tmp_path):
    """Offsets in the header that jaxlib ships, against those of `robustreg.solvers.ffi`."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    include = Path(jax.ffi.include_dir())
    (tmp_path / "offsets.cpp").write_text(OFFSETS)
    program = tmp_path / "offsets"
    subprocess.run(["g++", "-w", f"-I{include}", str(program) + ".cpp", "-o", str(program)], check=True)
    found = [int(x) for x in subprocess.run([program], check=True, capture_output=True, text=True).stdout.split()]
    api, pointer = ffi.Api, ctypes.sizeof(ctypes.c_void_p)
    functions = [api.functions.offset + pointer * i for i in (ffi.ERROR_CREATE, ffi.STREAM_GET)]
    own = [api.api_version.offset, api.internal_api.offset, *functions]
    names = (
        (ffi.Buffer, "dtype data rank dims"),
        (ffi.Args, "size types args size args"),
        (ffi.CallFrame, "api ctx stage args rets"),
        (ffi.Metadata, "api_version"),
        (ffi.Extension, "metadata"),
        (ffi._ErrorCreate, "message errc"),
        (ffi._StreamGet, "ctx stream"),
    )
    own += [getattr(structure, field).offset for structure, fields in names for field in fields.split()]
    assert own == found
