"""Many lanes, a cache full at a time.

On a CPU, lanes that are solved together share every pass over the problem, but the loop runs until the slowest of them
is done, and their vectors leave the cache when there are many. Lanes are therefore ordered by how hard they are
(discount, then alpha, then beta) and solved group after group: nobody waits long for the slowest, and every vector of
a group stays in cache. An accelerator wants all lanes at once.

Few lanes whose states are some hundreds, in lists of successors, are best solved one by one: a single lane is one long
vector, whereas a few beside each other are neither long vectors nor wide enough to be many short ones, and nobody waits
for anybody. (128 to 1,024 states, 2 to 32 lanes, KL, alpha, uncertain transitions: .45 to .95 of the time. From 2,000
states on in float64 it is 1.1 to 1.6, for then what lanes share fills the cache.)

Of what lanes share there is still one copy; what they do not share is picked for one group at a time. So where lanes
have several dense kernels, each for some of them, there are no groups: a product of matrices reads a kernel once for
all lanes that share it, and a group would hold, and read, a copy for each (2 to 9 times the time, 64 to 256 states).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from robustreg._core import pytrees
from robustreg.problems.dense import Dense
from robustreg.problems.successors import BoundSuccessors
from robustreg.problems.transitions import Transitions
from robustreg.regularisers.families import BoundAlpha
from robustreg.solvers.bound_problem import BoundProblem
from robustreg.solvers.tolerance import Tolerance

# A group has as many lanes as give vectors [S, lanes] of so many bytes (a dozen are in use at a time, and should stay
# in a core's cache), within the bounds. 64 to 256 KiB measured alike.
_BYTES, _FEWEST, _MOST = 2**17, 8, 256
# Up to so many lanes are solved one by one, if they have at least so many states and vectors of at most so many bytes.
_FEW, _STATES, _LONGEST = 32, 128, 2**13

Run = Callable[[BoundProblem, Tolerance, Array], Any]


def width(problem: BoundProblem) -> int:
    """Lanes of a group on a CPU."""
    size = problem.n_states * problem.dtype.itemsize
    long = problem.n_states >= _STATES and size <= _LONGEST
    if long and isinstance(problem.transitions, BoundSuccessors) and math.prod(problem.batch) <= _FEW:
        return 1
    return int(np.clip(2 ** round(np.log2(_BYTES / size)), _FEWEST, _MOST))


def in_groups(run: Run, problem: BoundProblem, tol: Tolerance, h: Array) -> Any:
    """Run `run(problem, tol, h)`, whose leaves end in the lanes' axes, in groups where that is faster.

    Args:
        run: solves lanes, each by itself.
        problem: the lanes.
        tol, h: `[*B]` and `[S, *B]`.
    """
    lanes, kernel = math.prod(problem.batch), problem.transitions
    if jax.export.is_symbolic_dim(lanes) or lanes <= width(problem):
        return run(problem, tol, h)
    if isinstance(kernel, Dense) and 1 < math.prod(kernel._lane_axes(len(problem.batch))) < lanes:
        return run(problem, tol, h)
    return lax.platform_dependent(problem, tol, h, cpu=lambda *x: _grouped(run, *x), default=run)


def _grouped(run: Run, problem: BoundProblem, tol: Tolerance, h: Array) -> Any:
    size, lanes = width(problem), math.prod(problem.batch)
    # (Nobody waits in a group of one.)
    order = _by_hardness(problem) if size > 1 else jnp.arange(lanes)
    # The last group repeats its last lane.
    padded = jnp.concatenate([order, jnp.broadcast_to(order[-1:], (-lanes % size,))]).reshape(-1, size)

    def solve(cells: Array) -> Any:
        index = jnp.unravel_index(cells, problem.batch)
        part = jax.tree.map(lambda x: pytrees.pick_lanes(x, index), (tol, h))
        return run(_take_lanes(problem, index), *part)

    found = lax.map(solve, padded)
    place = jnp.argsort(order) if size > 1 else order

    def put_back(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, -2)
        return x.reshape(*x.shape[:-2], -1)[..., place].reshape(x.shape[:-2] + problem.batch)

    return jax.tree.map(put_back, found)


def _by_hardness(problem: BoundProblem) -> Array:
    """Flat numbers of the lanes, `[n]`, the easy ones first."""
    reg: Any = problem.regulariser
    keys = [reg.beta] + ([reg.alpha] if isinstance(reg, BoundAlpha) else []) + [problem.discount]

    def flat(x: Array) -> Array:
        """Reduce to the largest over what is not an axis of lanes, one number per lane."""
        core = tuple(range(x.ndim - len(problem.batch)))
        return jnp.broadcast_to(jnp.max(x, axis=core), problem.batch).ravel()

    return jnp.lexsort([flat(x) for x in keys])


def _take_lanes(problem: BoundProblem, index: tuple[Array, ...]) -> BoundProblem:
    """The lanes at `index`, one array `[n]` per batch axis."""

    def pick(x: Any) -> Any:
        return x._take_lanes(index) if isinstance(x, Transitions) else pytrees.pick_lanes(x, index)

    names = (
        "transitions",
        "regulariser",
        "reward",
        "exit_rate",
        "discount",
        "complement",
        "horizon",
        "deviation",
        "valid",
        "magnitudes",
        "proved",
        "ball",
        "steps",
    )
    own = {name: getattr(problem, name) for name in names}
    leaves = jax.tree.map(pick, own, is_leaf=lambda x: isinstance(x, Transitions))
    return dataclasses.replace(problem, batch=index[0].shape, **leaves)
