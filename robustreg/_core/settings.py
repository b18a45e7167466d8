"""The caller's JAX settings in threads of our own.

`jax.enable_x64()`, `jax.default_matmul_precision()`, `jax.debug_nans()` and their like hold for one thread: a thread
that is started inside such a block begins with the process's own settings. It would then compute in float32 what its
caller asked for in float64.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import jax

# A setting that forbids other threads is about the caller's thread, not about the work.
_NOT_CARRIED = ("thread_guard",)


def carried(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function that runs under the JAX settings of the thread that called `carried`.

    Every public context manager of JAX that stands for an option (`jax.NAME` with `jax.config.jax_NAME`) is carried.

    Args:
        function: what another thread is to run.

    Returns:
        A function of the same arguments.
    """
    wanted = _read()

    def run(*args: Any, **kwargs: Any) -> Any:
        here = _read()
        with contextlib.ExitStack() as stack:
            for name, value in wanted.items():
                if here[name] != value:
                    stack.enter_context(getattr(jax, name)(value))
            return function(*args, **kwargs)

    return run


def _read() -> dict[str, Any]:
    """Values of all settings, by the name of their context manager, as the present thread sees them."""
    names = (name for name in dir(jax) if not name.startswith("_") and name not in _NOT_CARRIED)
    return {name: getattr(jax.config, f"jax_{name}") for name in names if hasattr(jax.config, f"jax_{name}")}
