"""One MDP over the memory of several devices.

Solvers, certificates and derivatives are programs over whole arrays, and JAX's compiler divides such a program among
the devices that hold its arguments. So there is nothing to a sharded solve but where the arrays lie:

* **lanes**: give `rr.kl` or `rr.mdp` leaves whose batch axis is sharded, and every device solves its own lanes of a
  problem that all of them hold. (They wait for each other at every step; a sweep over devices does not.)
* **states**: `shard` splits the rows of an MDP that is too large for one device. A device then holds the transitions
  out of its states. What it lacks for a backup are the values of other devices' states, S numbers a lane; transitions
  never move, and value, policy and perturbation stay where their states are.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from robustreg._core import checks
from robustreg.problems.dense import Dense
from robustreg.problems.matrix_free import MatrixFree
from robustreg.problems.mdps import MDP
from robustreg.problems.successors import Successors

_CORES = {"reward": 2, "initial": 1, "termination": 2, "available": 2}


def shard(mdp: MDP, devices: Sequence[Any] | Mesh | None = None, axis: str = "states", *, pad: bool = False) -> MDP:
    """Split the states of an MDP over devices. `solve` and everything else then take it like any other.

    An MDP that no single accelerator can hold is built on the host, `with jax.default_device(jax.devices("cpu")[0])`.

    Args:
        mdp: transitions are `Dense` or `Successors`, with or without batch axes, which are not split.
        devices: to split it over, or a mesh with an axis for states (another may be for lanes); None: all local ones.
        axis: name of that axis.
        pad: whether to add states where S is no multiple of their number: copies of the last one that nothing leads
            to. They change no other state's value and are the last in every result: cut it to the first S.

    Returns:
        The same MDP, with `[*B, S, ...]` leaves that carry a `NamedSharding` over S.

    Raises:
        ValueError: S is no multiple of the number of devices and `pad` is not set; the mesh has no such axis.
        TypeError: transitions are `MatrixFree`, whose arrays are the caller's to shard.
    """
    checks.expect_type(mdp, MDP, "first argument", "mdp")
    if isinstance(mdp.transitions, MatrixFree):
        raise TypeError("the transitions are a function: shard its parameters with jax.device_put, then build the MDP")
    pad = checks.flag("pad", pad)
    if not isinstance(axis, str):
        raise TypeError(f"axis must be the name of an axis of devices, got {type(axis).__name__}")
    if not isinstance(devices, Mesh):
        some = [] if not isinstance(devices, Sequence | np.ndarray) else list(devices)
        if devices is not None and not (some and all(isinstance(device, jax.Device) for device in some)):
            raise TypeError("devices must be a mesh or a sequence of jax devices, jax.devices() for example")
        devices = Mesh(np.array(jax.local_devices() if devices is None else devices), (axis,))
    if axis not in devices.shape:
        raise ValueError(f"the mesh has no axis {axis!r}; there are: {', '.join(map(str, devices.shape))}")
    count, n_states = devices.shape[axis], mdp.n_states
    extra = -n_states % count
    if extra and not pad:
        raise ValueError(
            f"{n_states} states do not divide by {count} devices: take a divisor of {n_states}, or pass pad=True to "
            f"add {extra} states that nothing leads to, last in every result"
        )
    mdp = _padded(mdp, extra) if extra else mdp

    def place(x: jax.Array, core: int) -> jax.Array:
        spec = PartitionSpec(*[None] * (x.ndim - core), axis)
        return jax.device_put(x, NamedSharding(devices, spec))

    whole = NamedSharding(devices, PartitionSpec())
    numbers = {name: jax.device_put(getattr(mdp, name), whole) for name in ("discount", "complement")}
    return dataclasses.replace(_mapped(mdp, place), **numbers)


def _mapped(mdp: MDP, change: Any) -> MDP:
    """Every leaf with a state axis changed: `change(x, core)` for an `x` of shape `[*B, S, ...]` with `core` axes from
    S on."""
    kernel: Any = mdp.transitions
    names = ("probabilities",) if isinstance(kernel, Dense) else ("indices", "probabilities")
    kernel = dataclasses.replace(kernel, **{name: change(getattr(kernel, name), 3) for name in names})
    leaves = {n: change(getattr(mdp, n), core) for n, core in _CORES.items() if getattr(mdp, n) is not None}
    return dataclasses.replace(mdp, transitions=kernel, **leaves)


def _padded(mdp: MDP, extra: int) -> MDP:
    """The MDP with copies of its last state behind it, in which no episode starts and to which nothing leads."""

    def widen(x: jax.Array, core: int) -> jax.Array:
        widths = [(0, 0)] * x.ndim
        widths[x.ndim - core] = (0, extra)
        return jnp.pad(x, widths, mode="edge")

    wide = dataclasses.replace(_mapped(mdp, widen), initial=_zeros_behind(mdp.initial, extra), grid=None)
    if isinstance(wide.transitions, Successors):
        return wide
    kernel: Any = wide.transitions
    return dataclasses.replace(wide, transitions=Dense(_zeros_behind(kernel.probabilities, extra)))


def _zeros_behind(x: jax.Array, extra: int) -> jax.Array:
    """`x` with zeros behind its last axis."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, extra)])
