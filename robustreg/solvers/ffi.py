"""Functions in Python that a compiled JAX program calls: a handler of XLA's foreign function interface, by ctypes.

The structures are those of `xla/ffi/api/c_api.h`, which jaxlib ships; only what a handler needs of them is spelled out.
Fields are only ever appended there, so that one layout serves every version 0.x of the interface.
"""

import ctypes as C
from collections.abc import Callable
from typing import Any, NamedTuple

import jax


def _struct(name: str, *fields: tuple[str, Any], base: bool = True) -> Any:
    head = [("struct_size", C.c_size_t), ("extension_start", C.c_void_p)] if base else []
    return type(name, (C.Structure,), {"_fields_": [*head, *fields]})


# Functions of `Api` that are called here, by their place in the table.
ERROR_CREATE, STREAM_GET, FUNCTIONS = 0, 4, 5
_INTERNAL, _METADATA = 13, 1  # XLA_FFI_Error_Code_INTERNAL, XLA_FFI_Extension_Metadata

Version = _struct("Version", ("major_version", C.c_int), ("minor_version", C.c_int))
Api = _struct(
    "Api",
    ("api_version", Version),
    ("internal_api", C.c_void_p),
    ("functions", C.c_void_p * FUNCTIONS),
)
Buffer = _struct(
    "Buffer", ("dtype", C.c_int), ("data", C.c_void_p), ("rank", C.c_int64), ("dims", C.POINTER(C.c_int64))
)
Args = _struct("Args", ("size", C.c_int64), ("types", C.c_void_p), ("args", C.POINTER(C.c_void_p)))
CallFrame = _struct(
    "CallFrame", ("api", C.POINTER(Api)), ("ctx", C.c_void_p), ("stage", C.c_int), ("args", Args), ("rets", Args)
)
Metadata = _struct("Metadata", ("struct_size", C.c_size_t), ("api_version", Version), base=False)
Extension = _struct(
    "Extension",
    ("struct_size", C.c_size_t),
    ("type", C.c_int),
    ("next", C.c_void_p),
    ("metadata", C.POINTER(Metadata)),
    base=False,
)
_ErrorCreate = _struct("_ErrorCreate", ("message", C.c_char_p), ("errc", C.c_int))
_StreamGet = _struct("_StreamGet", ("ctx", C.c_void_p), ("stream", C.c_void_p))
_HANDLER = C.CFUNCTYPE(C.c_void_p, C.POINTER(CallFrame))
_FUNCTION = C.CFUNCTYPE(C.c_void_p, C.c_void_p)


class Call(NamedTuple):
    """One call from a compiled program.

    Attributes:
        buffers: addresses of the arguments, then of the results.
        lanes: leading axis of the first result.
        stream: where it has to happen, on a GPU; a function, since a CPU has none.
    """

    buffers: list[int]
    lanes: int
    stream: Callable[[], int]


Launch = Callable[[Call], None]
# A registered handler is there for as long as the process.
_handlers: dict[tuple[str, str], Any] = {}


def register(target: str, platform: str, launch: Launch) -> None:
    """Register a function as the target of `jax.ffi.ffi_call`; a second time under one name does nothing.

    Args:
        target: the name to call it by.
        platform: "CUDA" or "cpu".
        launch: called with each `Call`; what it raises becomes the error of the compiled program.
    """
    if (target, platform) in _handlers:
        return

    def handle(frame: Any) -> int | None:
        return _handle(frame.contents, launch)

    _handlers[target, platform] = handler = _HANDLER(handle)
    address = C.cast(handler, C.c_void_p).value
    jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(address), platform=platform)


def _handle(frame: Any, launch: Launch) -> int | None:
    try:
        if frame.extension_start and _answered(frame):
            return None
        buffers = [
            C.cast(pack.args[i], C.POINTER(Buffer)).contents
            for pack in (frame.args, frame.rets)
            for i in range(pack.size)
        ]
        lanes = int(buffers[frame.args.size].dims[0])
        launch(Call([int(b.data or 0) for b in buffers], lanes, lambda: _stream(frame)))
        return None
    except BaseException as error:  # nothing may leave a callback
        message = f"{type(error).__name__}: {error}".encode()
        return _call(frame, ERROR_CREATE, _ErrorCreate(C.sizeof(_ErrorCreate), None, message, _INTERNAL))


def _answered(frame: Any) -> bool:
    """Whether the call only asked for the interface's version, which is that of the program that calls."""
    extension = C.cast(frame.extension_start, C.POINTER(Extension)).contents
    if extension.type != _METADATA:
        return False
    wanted, own = extension.metadata.contents.api_version, frame.api.contents.api_version
    wanted.major_version, wanted.minor_version = own.major_version, own.minor_version
    return True


def _call(frame: Any, function: int, args: Any) -> int | None:
    return _FUNCTION(frame.api.contents.functions[function])(C.addressof(args))


def _stream(frame: Any) -> int:
    args = _StreamGet(C.sizeof(_StreamGet), None, frame.ctx, None)
    _call(frame, STREAM_GET, args)
    return int(args.stream or 0)
