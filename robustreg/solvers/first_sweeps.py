"""Plain sweeps before Newton's method: how many, and whether they pay.

Far from V* a policy is about to change, and where it is nearly deterministic its linear system is hard besides. A sweep
`V <- T V` brings news one state further, in a plane to all of them in some `sqrt(S)` sweeps, and a policy that is worth
evaluating: with `4 sqrt(S)` of them (but two horizons at most: by then episodes are over) grids of 256 and 1,024
states, beta from .1 to 300, take .35 of the products with chains at a discount of .99 (of the largest number .28), and
.52 (.82) at .999. (The best polynomial there is, that of GMRES, would take .71 to .85 of the products of BiCGSTAB, with
and without sweeps: where beta is small and the policy right at once, the system itself is what is hard.)

Whether that pays is a matter of the machine. On an accelerator a sweep is one kernel, and costs less than a product and
the inner products around it. On a CPU it costs 4 to 9 products (it reads the rows of every action and takes A
exponentials, where a product reads one row of a mixture), and saves 5 at most (at large beta): none there.
"""

import functools

import jax.numpy as jnp
from jax import Array, lax

from robustreg._core import loops
from robustreg.solvers import bellman, methods
from robustreg.solvers.bound_problem import BoundProblem
from robustreg.solvers.methods import Solver

# States from which plain sweeps do not pay on an accelerator either.
_LARGE = 4096


def swept(problem: BoundProblem, solver: Solver, limit: Array, h: Array) -> tuple[Array, Array]:
    """Take the plain sweeps that Newton's method begins with, without books.

    Args:
        problem: the lanes.
        solver: the method; others than Newton's begin with none.
        limit: cap on steps, of which one is left.
        h: start, `[S, *B]`.

    Returns:
        h after them, `[S, *B]`, and their number, `[*B]`.
    """
    none = loops.alike((h, jnp.zeros(problem.batch, jnp.int32)), problem, limit)
    # (Without a discount, sweeps need not stay below what every policy can reach: see `undiscounted`.)
    if type(solver) is not methods.Newton or problem.averaged or problem.proved is not None:
        return none
    most = usual(problem.n_states) if solver.sweeps is None else solver.sweeps
    if most == 0:
        return none
    several = functools.partial(_sweep, most)
    if solver.sweeps is not None:
        return several(problem, limit, h)
    return lax.platform_dependent(problem, limit, h, cpu=lambda *_: none, default=several)


def _sweep(most: int, problem: BoundProblem, limit: Array, h: Array) -> tuple[Array, Array]:
    own, zero = of_lanes(problem, most, limit), jnp.zeros(problem.batch, problem.dtype)

    def once(i: Array, h: Array) -> Array:
        return jnp.where(i < own, bellman.backup(problem, h, zero)[0], h)

    new = loops.fori_loop(0, most, once, h, (problem, own))
    # What overflows here must not look like an input that is not finite.
    return jnp.where(jnp.all(jnp.isfinite(new), axis=0)[None], new, h), own


def usual(n_states: int) -> int:
    """Return how many sweeps an accelerator begins with; none where sweeps and products both wait for memory."""
    return round(4 * n_states**0.5) if n_states < _LARGE else 0


def of_lanes(problem: BoundProblem, most: int, limit: Array) -> Array:
    """Count each lane's sweeps, `[*B]`: `most`, two horizons if they are less, and one step left of its `limit`."""
    few = jnp.where(2 * problem.horizon < most, jnp.ceil(2 * problem.horizon), most).astype(jnp.int32)
    return jnp.broadcast_to(jnp.clip(jnp.minimum(few, limit - 1), 0), problem.batch)
