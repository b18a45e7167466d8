r"""The regularised Bellman operator, its derivative, and what one residual of it proves: the page to read first.

**The problem.** A Markov decision process has S states and A actions. Action a in state s earns `r(s,a)` and leads to
state t with probability `P(t|s,a)`; what is earned later counts `g` times less per step. A policy `pi(a|s)` pays
`Omega(pi(.|s))` in every state that it visits, a convex cost with which its adversary is paid off. Its value is the
expected discounted sum of `r - Omega`, and V* is the best value there is.

**The operator.** Looking one step ahead from a value V, the best that a state can do is

    (T V)(s)  =  max_p  sum_a p(a) q(s,a) - Omega(p)  =  Omega*(q(s,.)),      q(s,a) = r(s,a) + g sum_t P(t|s,a) V(t),

and the p that does it is the regularised greedy policy. T is a contraction by g in the largest norm, so that it has one
fixed point, which is V* [Geist, Scherrer and Pietquin 2019, prop. 2], and the greedy policy of V* is the best one.

**Methods** (`methods`) differ in how they correct V by the residual `d = T V - V`:

* value iteration, `V <- T V`: the error shrinks by g a step, or faster if the chain mixes;
* modified policy iteration: m steps of the greedy policy's own, linear, operator for each maximisation;
* Newton's method, `V <- V + (I - g P_pi)^{-1} d`, is policy iteration: the value of the greedy policy, exactly. It
  rises monotonically from the second step on and converges quadratically where T is smooth;
* Anderson's acceleration combines the last few steps of value iteration by least squares.

**Stopping.** Whatever the method, one residual bounds the error: see the certificate below. The loop stops when that
bound is within the tolerance (`loop`).

In the notation of the code, with K the derivative of T,

    T V = Omega*(r + g P V)          q_values, backup
    dT/dV = K = g P_pi               Chain, with pi = grad Omega*(q)  (Danskin)

`T` is monotone, convex and, when no episode ends, `T(V + c) = T V + g c`.

**Offsets.** Values are carried as `V = h + c`, one number `c` per lane. With the exit rate
`e(s,a) = (1-g) + g termination(s,a)`,

    T(h + c) - c = Omega*(r - c e + g P h),

so that a constant costs nothing and rounding is that of the small `h`, not of `V`, which is larger by 1/(1-g).
`1-g` is a leaf of its own, rounded once from double precision: in float32 `1 - 0.9999` is wrong in the fourth digit.

**Certificate.** With `d = T V - V` [MacQueen 1966; Puterman 1994, sec. 6.6], for any V

    T V + g/(1-g) min d  <=  V*  <=  T V + g/(1-g) max d,

where min d is replaced by min(min d, 0) and max d by max(max d, 0) if episodes end. Then 1/(1-g) may also be replaced
by any `w >= 1 + g P_a w` for every action a that may be taken (`ranges.horizon`): from `T V <= V + x`, x >= 0, follows
`T(V + x w) <= T V + x max_a g P_a w <= V + x w`, hence `V* <= V + x w`, and likewise from below.
One more step, `V* <= T(V + x w) <= T V + x max_a g P_a w <= T V + x (max w - 1)`, is why `max w - 1` stands in the
place of g/(1-g).

**No discount.** None of this needs g < 1 where such a w exists: then T contracts by `1 - 1/max w` in the norm
`max_s |V(s)|/w(s)`, has one fixed point, and sweeps lead to it, also at g = 1. A finite w at g = 1 exists exactly where
every policy's episodes end (`lifetimes`); what can be proved where only some do, `undiscounted` says.

**Rounding.** In floating point `T` is computed with an error; an error of `delta` in every entry widens each side by
`delta/(1-g)`, except for the error in `c e`: along every trajectory the discounted exit rates add up to exactly 1, so
that it widens them by `u |c|` only.
`rounding` bounds both, from the size of every summand of the backup.

**Rows.** All this is said of rows of P that sum to `1 - termination`. How far they miss it is measured at every solve
(inside jit nobody else can): by rounding, or by more, which `deviation_cost` adds to the bounds, or by so much that the
lane is refused.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from robustreg._core import loops, pytrees
from robustreg.regularisers.bound import Bound, maximise
from robustreg.regularisers.divergences import Scales
from robustreg.solvers.bound_problem import BoundProblem
from robustreg.solvers.chains import Chain


def q_values(problem: BoundProblem, h: Array, c: Array) -> Array:
    """Compute `r + g P V - c` at `V = h + c`, `[A, S, *B]`, from `h [S, *B]` and `c [*B]`."""
    return _looking_ahead(problem, problem.transitions._expect(h), c)


def _looking_ahead(problem: BoundProblem, expected: Array, c: Array) -> Array:
    return (problem.reward - c[None, None] * problem.exit_rate) + problem.discount[None, None] * expected


def worst_transitions(problem: BoundProblem, h: Array, c: Array) -> Any:
    """Find the worst transitions at `V = h + c`, as the set has them, for a backup and its chain; None without one.

    (Each would search for them again: compilers merge expressions that are the same, but not loops.)
    """
    return None if problem.ball is None else problem.ball.worst(h, c)


def backup(problem: BoundProblem, h: Array, c: Array, worst: Any = None) -> tuple[Array, Array, Array]:
    """Compute `T V - c [S, *B]`, its policy `[A, S, *B]` and what it maximises, `[A, S, *B]`, at `V = h + c`.

    That is `q - c`, or what the worst transitions leave of it.
    """
    operator, left = faced(problem, h, c, worst_transitions(problem, h, c) if worst is None else worst)
    return *maximise(operator, left), left


def faced(problem: BoundProblem, h: Array, c: Array, worst: Any) -> tuple[Bound, Array]:
    """Return the operator and the action values less c, `[A, S, *B]`, that the worst transitions leave a policy."""
    if problem.ball is None:
        return problem.regulariser, q_values(problem, h, c)
    left = _looking_ahead(problem, problem.ball.expected(problem.transitions, h, worst), c)
    return problem.ball.operator(problem.regulariser, problem.discount, worst), left


def of_one_step(problem: BoundProblem) -> Array:
    """Estimate the worth of the best single step, `[S, *B]`: `T 0`, or nearly so, without a product; else 0."""
    fixed = loops.alike(lax.stop_gradient(problem))
    h = fixed.regulariser.guess(fixed.reward)
    return jnp.broadcast_to(jnp.where(jnp.isfinite(h), h, 0), (problem.n_states, *problem.batch))


def cost(problem: BoundProblem, th: Array, q: Array) -> Array:
    """Compute `max_s (max_a q - T V)`, `[*B]`: the most that the regulariser takes off, in reward units."""
    return jnp.max(problem.regulariser.excess(q, th), axis=0)


def sound(problem: BoundProblem) -> Array:
    """Tell whether the numbers of a lane are in range, `[*B]`. NaN in a reward shows in the first backup."""
    return jnp.broadcast_to(problem.valid if problem.proved is None else problem.valid & problem.proved, problem.batch)


def chain(problem: BoundProblem, policy: Array, worst: Any = None) -> Chain:
    """Return the chain of a policy `[A, S, *B]`; with uncertain transitions that of the worst ones."""
    exit_rate = pytrees.total(policy * problem.exit_rate) if problem.ends else problem.exit_rate[0]
    exit_rate = jnp.broadcast_to(exit_rate, policy.shape[1:])
    given = policy
    transitions, policy, backwards = problem.transitions._induced(policy)
    own = problem.ends or problem.ball is not None
    longest = problem.horizon if own else jnp.broadcast_to(problem.horizon, problem.discount.shape)
    if problem.averaged:  # `I - P_pi` has no inverse
        exit_rate, longest = jnp.zeros_like(exit_rate), jnp.full_like(longest, jnp.inf)
    pull = None
    if problem.ball is not None:
        assert worst is not None, "the worst transitions depend on the value"
        pull = problem.ball.pull(given, problem.discount, worst)
        exit_rate = exit_rate + pull.apply(jnp.ones_like(exit_rate))
    return Chain(transitions, policy, problem.discount, exit_rate, longest, backwards, problem.ends, pull)


def extremes(d: Array, ends: bool) -> tuple[Array, Array]:
    """Find the smallest and largest entry per lane, `[*B]`, clipped at 0 if episodes end. NaN if any is not finite.

    The test for finite entries is explicit: reductions by max over axis 0 have been seen to lose NaN (JAX 0.10, CPU).
    """
    # One reduction for all three: the compiler makes three kernels of every separate one.
    low, high, broken = jnp.max(jnp.stack([-d, d, jnp.where(jnp.isfinite(d), 0, jnp.inf)]), axis=1)
    low = -low
    if ends:
        low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
    return jnp.where(broken > 0, jnp.nan, low), jnp.where(broken > 0, jnp.nan, high)


def ratio(problem: BoundProblem) -> Array:
    """Compute `g/(1-g)`, or less where episodes end sooner, `[*b]`: what a residual still costs after the backup."""
    if problem.ball is not None:
        return problem.horizon - 1  # L/(1-L)
    plain = problem.discount / problem.complement  # infinite at a discount of 1
    return jnp.minimum(plain, problem.horizon - 1) if problem.ends else plain


def value_bounds(problem: BoundProblem, h: Array, c: Array, th: Array, cost: Array) -> tuple[Array, Array]:
    """Certified bounds on V*, `[S, *B]` each, from one backup `th = T V - c` at `V = h + c`; rounding included."""
    low, high = extremes(th - h, problem.ends)
    share, size = ratio(problem), jnp.max(jnp.abs(h), axis=0)
    below, above = share * low, share * high
    if problem.ball is not None and not problem.ends:
        # T keeps constants up to g, but contracts by L: the middle of the residual is moved away first.
        moved, rest = 0.5 * (low + high) * problem.discount / problem.complement, 0.5 * share * (high - low)
        below, above = moved - rest, moved + rest
    moved = jnp.maximum(jnp.abs(below), jnp.abs(above))
    # Forming the bounds themselves rounds by a few units of their size.
    slack = rounding(problem, size, c, cost) + deviation_cost(problem, size + jnp.abs(c) + moved)
    slack = slack + 4 * float(jnp.finfo(problem.dtype).eps) * moved
    middle = th + c[None]
    return middle + (below - slack)[None], middle + (above + slack)[None]


def deviation_cost(problem: BoundProblem, size: Array) -> Array:
    """Bound what rows of P that miss `1 - termination` by `x` change in a value of `size`, `[*B]`.

    With such rows T is off by at most `g x size`, and contracts by `g (1 + x)`, where `g x <= (1 - g)/2` (else the lane
    is refused): the two together cost at most `2 g x size / (1 - g)`, and as much again for the bounds themselves.
    At a discount of 1 the same holds with the horizon for 1/(1 - g): of `w >= 1 + P_a w` rows that are off leave
    `w >= 1 - x max w + P'_a w`, of which `x max w <= 1/2` is lost.
    """
    off = 4 * problem.discount * problem.deviation * size
    if problem.proved is None:
        return off / problem.complement
    # (No deviation costs nothing, whatever the horizon.)
    return jnp.where(problem.complement > 0, off / problem.complement, jnp.where(off > 0, off * problem.horizon, 0))


def rounding(problem: BoundProblem, size: Array, c: Array, cost: Array) -> Array:
    """Bound the error that floating point adds to each side of the certificate, `[*B]`.

    The error of one backup is at most `u` times the sum of: the products and sums of `P h` (whose roundings are
    bounded by their number; unless the problem is `strict`, long sums count by four times the square root of their
    length, which holds with a probability close to 1 [Higham and Mary 2019]), the storage of P, r and g, and the
    conjugate, which errs by what its regulariser says (`noise`: for KL by `u (2 + log A)/beta`, near the prior by a
    multiple of u times its cost) and whose parameters, stored with relative error u, by `u` times the cost of
    regularisation. The error of a reward counts by the probability of the action: a penalty of 1e6 on what nobody does
    is exact enough.

    Args:
        size, c: of the iterate `V = h + c`: `max_s |h|` and c, `[*B]`.
        cost: `max_a q - T V`, `[*B]`, largest over states: the size of what the regulariser takes off.
    """
    unit = 0.5 * float(jnp.finfo(problem.dtype).eps)
    per_step = rounding_of_step(problem, size, c, cost)
    return unit * (per_step * problem.horizon + 4 * jnp.abs(c) + 2 * size)


def rounding_of_step(problem: BoundProblem, size: Array, c: Array, cost: Array) -> Array:
    """Bound the error of one backup but for that of `c e`, in units of u, `[*B]`; see `rounding`."""
    unit = 0.5 * float(jnp.finfo(problem.dtype).eps)
    length = problem.transitions.fan_out
    terms = 4 + (length if problem.strict else min(length, 4 * length**0.5))
    n_actions = problem.reward.shape[0]
    log_actions = float(np.log(n_actions))
    known = problem.magnitudes
    near = size + jnp.abs(c) if problem.ends else size
    reward = jnp.where(near <= known.limit, known.charged, known.reward)
    noisy = 0 if problem.ball is None else problem.ball.rounding(problem.discount, size + jnp.abs(c))
    scales = Scales(
        unit=unit,
        logs=2 + log_actions,
        log_prior=known.log_prior,
        temperature=known.temperature,
        cost=jnp.abs(cost) + 4 * unit * (reward + size + jnp.abs(c)),
        reach=2 * (known.reward + size) + jnp.abs(c),
    )
    return (
        (terms + 2 + n_actions**0.5) * size
        + (2 + n_actions**0.5) * jnp.abs(cost)
        + (2 + log_actions + known.log_prior) * jnp.minimum(jnp.abs(cost), known.temperature)
        + problem.regulariser.noise(scales)
        + 3 * reward
        + noisy
    )
