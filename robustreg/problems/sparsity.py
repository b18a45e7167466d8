"""What successor lists look like from the other end, worked out once on the host.

A policy's chain `K = g P_pi` is multiplied with vectors a few hundred times for each policy, backwards (`K^T`) as often
as forwards. Two things about *where* the successors are, whatever their probabilities, make such a product cheap:

* **Neighbours.** The actions of a state often lead to the same few states: four moves that may slip have four
  neighbours between them, not twelve. Averaged over the policy first, a row of the chain has one entry per neighbour.
* **Sources.** Backwards, a state collects from wherever leads to it. Gathering from a list of its sources is faster
  than scattering (three times on one CPU core, ten times and more with lanes; on a GPU scattering needs atomic
  operations), if the lists are about equally long. As many sources as a third of the states have are gathered, what
  few states have beyond that is scattered: the hybrid format of sparse matrices [Bell and Garland 2009].

`find` looks at the indices of a kernel, if they are concrete and of one device, and keeps what it found for as long as
the array lives. The shapes of what it finds depend on the indices, and every shape is a program of its own; so it
looks at kernels only whose neighbours are few, or that are so large that compiling them is not what takes the time.
"""

import threading
import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from robustreg._core import checks, pytrees

# Entries S A K below which every kernel is quick enough, and from which on also one without common neighbours is
# looked at. Scattering a number costs about four times as much as gathering one.
_SMALL, _LARGE, _SCATTER = 1024, 2**14, 4

_found: dict[int, "Pattern | None"] = {}
_lock = threading.Lock()


@pytrees.dataclass
class Pattern:
    """Places of the nonzero entries of a policy's chain, which are numbered `u S + s`.

    Attributes:
        neighbours: `[U, S]`, the successor of entry `(u, s)`.
        slot: `[K, A, S]`, which neighbour a successor is; None if every successor is a neighbour of its own and
            `u = k A + a`.
        sources: `[D, S]`, entries that lead to a state; -1 is padding.
        overflow, overflow_targets: `[M]` entries beyond those (-1 is padding), and the states that they lead to.
        raw: whether these are leaves of integers, as the library's own programs take them (see `_core.discrete`).
    """

    neighbours: Array = pytrees.discrete(int)
    slot: Array | None = pytrees.discrete(int)
    sources: Array = pytrees.discrete(int)
    overflow: Array = pytrees.discrete(int)
    overflow_targets: Array = pytrees.discrete(int)
    raw: bool = pytrees.static(default=True, repr=False)


def find(indices: Any) -> Pattern | None:
    """Find the pattern of successor lists `[S, A, K]`; None where none is worth having, or they cannot be seen."""
    if not isinstance(indices, jax.Array) or checks.is_traced(indices) or len(indices.devices()) > 1:
        return None
    key = id(indices)
    with _lock:
        if key not in _found:
            _found[key] = _look(indices)
            weakref.finalize(indices, _found.pop, key, None)
        return _found[key]


def _look(indices: Array) -> Pattern | None:
    if indices.size < _SMALL:
        return None
    n_states = indices.shape[0]
    lists = np.asarray(indices).reshape(n_states, -1)
    order = np.argsort(lists, axis=1, kind="stable")
    ascending = np.take_along_axis(lists, order, axis=1)
    new = np.diff(ascending, axis=1, prepend=-1) != 0
    counts = new.sum(axis=1)
    width = int(counts.max())
    slot = None
    if 2 * width <= lists.shape[1]:
        rank = np.cumsum(new, axis=1) - 1
        # Lists shorter than the longest are padded with their first neighbour, at which nothing is ever put.
        neighbours = np.repeat(ascending[:, :1], width, axis=1)
        np.put_along_axis(neighbours, rank, ascending, axis=1)
        slot = np.empty_like(lists)
        np.put_along_axis(slot, order, rank.astype(lists.dtype), axis=1)
        slot = slot.reshape(indices.shape).transpose(2, 1, 0)
        used = (np.arange(width) < counts[:, None]).T
    elif indices.size >= _LARGE:
        neighbours = lists.reshape(indices.shape).transpose(0, 2, 1).reshape(n_states, -1)
        used = np.ones(neighbours.T.shape, bool)
    else:
        return None
    neighbours = np.ascontiguousarray(neighbours.T)
    sources, overflow, targets = _reversed(neighbours, used)

    def place(x: np.ndarray) -> Array:
        return jax.device_put(x.astype(np.int32), indices.sharding)

    # Not traced, where a caller is: what is kept has to outlive the trace.
    with jax.ensure_compile_time_eval():
        slot = None if slot is None else place(slot)
        return Pattern(place(neighbours), slot, place(sources), place(overflow), place(targets))


def _reversed(neighbours: np.ndarray, used: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sources, and the entries that are not among them with their targets."""
    n_states = neighbours.shape[1]
    entries = np.flatnonzero(used)
    targets = neighbours.ravel()[entries]
    order = np.argsort(targets, kind="stable")
    entries, targets = entries[order], targets[order]
    degree = np.bincount(targets, minlength=n_states)
    place = np.arange(entries.size) - (np.cumsum(degree) - degree)[targets]
    # A further row of the lists costs S gathers and saves as many scatters as there are states with so many sources.
    having = np.bincount(place)
    # (Both sizes are rounded up by at most a quarter, so that problems of a kind share a program.)
    depth = _rounded(max(1, int(np.count_nonzero(_SCATTER * having >= n_states))))
    sources = np.full((depth, n_states), -1, np.int64)
    listed = place < depth
    sources[place[listed], targets[listed]] = entries[listed]
    left = int(np.count_nonzero(~listed))
    padding = _rounded(max(left, sources.size // 32)) - left
    overflow = np.pad(entries[~listed], (0, padding), constant_values=-1)
    return sources, overflow, np.pad(targets[~listed], (0, padding))


def _rounded(n: int) -> int:
    """The next number of at most three binary digits."""
    step = 1 << max(n.bit_length() - 3, 0)
    return -(-n // step) * step


def picked(weights: Array, entries: Array) -> tuple[Array, Array]:
    """Weights of entries, and the states that they start from.

    Args:
        weights: `[U, S, *B]`.
        entries: `[...]`, -1 is padding.

    Returns:
        `[..., *B]`, 0 for padding, and `[...]`.
    """
    n_states = weights.shape[1]
    flat = weights.reshape(-1, *weights.shape[2:])
    safe = jnp.maximum(entries, 0)
    real = (entries >= 0).reshape(entries.shape + (1,) * (flat.ndim - 1))
    return jnp.where(real, flat[safe], 0), safe % n_states
