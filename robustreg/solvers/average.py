r"""Average reward: what a policy earns per step in the long run.

**Problem.** Without a discount, and with no end to come, the return is infinite; its growth per step is not. The best
gain g and a bias h solve

    g + h  =  T h  =  Omega*(r + P h),

`bellman`'s operator at a discount of 1, and the greedy policy of h earns g per step, costs of regularisation included
[Puterman 1994, ch. 8]. h is determined up to a constant; `g/(1 - d) + h` is, up to one, what values with a discount d
tend to. If every policy's chain has one recurrent class (unichain), such a pair exists.

**The same loop.** Write `V = h + c/(1 - d)`: with c the gain, `bellman`'s `T(h + c) - c` reads

    Omega*(r - c e + P h),        e = 1,

so that a `BoundProblem` with discount, exit rate and complement 1 *is* this equation, and residual, rounding bound,
certificate, Newton's method and stopping rule are those of `solve`. (What `loop` moves from h to c between two steps
means nothing here: the next residual takes it off again, as it would any other guess of the gain.) The linear systems,
`(I - P_pi) x = d` up to a constant, are solved on vectors of mean 0, as ever where no episode ends, and no step depends
on the period of a chain. Where a policy's chain falls apart there is no solution: a lane that the last step has not
improved takes a discount just below 1 for it (`Howard`). Without a `tol`, a lane stops where the half-width is below
the rounding bound, if that is below the cube root of the precision.

**Certificate.** For *any* V, and every start state s, the best gain g(s) lies in

    min (T V - V)  <=  g(s)  <=  max (T V - V).

From `T V <= V + b` and `T(V + x) = T V + x`, by monotonicity, `T^n V <= V + n b`, and T^n V is the most that n steps
can earn with V after them: no policy, with whatever memory, earns more than b per step in the long run. From
`T V >= V + a`, with pi greedy for V, `T_pi V = T V >= V + a`, hence `T_pi^n V >= V + n a`: pi itself earns a per step
at least, wherever it starts. Neither needs the chain to be of any kind. Where the best gain depends on the start
(several classes that cannot reach each other), the interval holds all of them, is never smaller than their spread, and
the lane does not converge to less: STAGNATED or MAX_STEPS, with bounds that are true. An error of `delta` in T V widens
each side by delta: the horizon of `bellman.rounding` is 1.

**Derivatives.** With mu the stationary distribution of the policy, `dg = <mu, d_theta T h>`, and dh solves
`(I - P_pi) dh = d_theta T h - dg` [Schweitzer 1968]. Both come from the chain that ends when it comes `home`, to a
state that it always comes back to: its occupancy of a tour from home is mu up to scale, and its sums of
`d_theta T h - dg` until it comes home are dh. That is a chain as in every other solve, with `linear`'s checks and ways
out; if home is not reached from everywhere, its system is singular, is not solved, and derivatives are NaN.

**Cost** of a solve: that of `solve` at a discount near 1 (some ten backups, as many linear systems), whatever the
mixing of the chain; of a gradient of the gain, two or three linear systems, and one more for the bias.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from robustreg._core import checks, loops, pytrees
from robustreg.problems.mdps import MDP
from robustreg.problems.transitions import Transitions
from robustreg.regularisers.regulariser import Regulariser
from robustreg.solvers import bellman, bound_problem, implicit, krylov, linear, loop, methods, plain, readings
from robustreg.solvers.bound_problem import BoundProblem
from robustreg.solvers.solution import Answer, Status
from robustreg.solvers.tolerance import Tolerance


@pytrees.dataclass
class Average(Answer):
    """Solution of an average-reward problem, batch axes leading.

    Attributes:
        gain: best reward per step in the long run, less the cost of regularisation, `[*B]`; within `tol` of it, from
            every start state, where converged.
        bias: what it is worth to begin in a state, `[*B, S]`, in reward units: `g + bias = T bias`, normalised to
            `<initial, bias> = 0`. (Not certified: the interval is that of the gain.)
        lower, upper: certified bounds on the best gain from every start state, `[*B]`, rounding included; the policy
            earns `lower` at least, from everywhere.
        policy: `grad Omega*(r + P bias)`, `[*B, S, A]`.
        perturbation: the adversary's worst case against it, `Q - V - gain`, `[*B, S, A]`: on the support of the policy
            `r - perturbation + P bias - bias = gain`. 0 on masked actions.
        status: `Status` codes, `[*B]` int32.
        steps: backups until the lane stopped, `[*B]` int32.
    """

    gain: Array
    bias: Array
    lower: Array
    upper: Array
    policy: Array
    perturbation: Array
    status: Array
    steps: Array

    @property
    def gap(self) -> Array:
        """Certified uncertainty of the gain, `upper - lower`, `[*B]`."""
        return self.upper - self.lower

    def _failure(self, code: Status, lane: tuple[int, ...]) -> str:
        lower, upper = (float(np.asarray(x)[lane]) for x in (self.lower, self.upper))
        said = code.advise(self.gain.dtype)
        if code in (Status.STAGNATED, Status.MAX_STEPS):
            stopped = "the step limit came first" if code is Status.MAX_STEPS else "the interval stopped shrinking"
            said = (
                f"{stopped}. If the best gain depends on the start, it holds all of them; else raise max_steps or tol"
            )
        return f"(gain in [{lower:.6g}, {upper:.6g}]): {said}"


def solve_average(
    mdp: MDP, reg: Regulariser | None, *, tol: ArrayLike | None = None, max_steps: int | Array | None = None
) -> Average:
    """Solve a regularised MDP for the best reward per step, with a certificate.

    Args:
        mdp: from `robustreg.mdp` or a generator, without termination. Its discount is ignored, lanes of it included.
        reg: from `robustreg.kl` or its like; None is the plain maximum.
        tol: certified bound on the error of `gain`, in reward units per step, `[*B]` or a number; None: as tight as the
            precision supports.
        max_steps: cap on backups; None: 200.

    Returns:
        An `Average`. Where `status` is CONVERGED, the best gain from every start state is in `[lower, upper]`, with
        `upper - lower <= 2 tol`; it is in `[lower, upper]` in every lane that is finite. Floating outputs are
        differentiable in every leaf of `mdp` (but its discount) and `reg`, in both modes and to any order, where the
        policy's chain has one recurrent class; elsewhere derivatives are NaN.

    Raises:
        TypeError, ValueError: arguments of the wrong kind or shape; an MDP whose episodes end.
    """
    reg = plain.regulariser_or_none(mdp, reg)
    loop.check_arguments(mdp, reg, None, tol)
    if mdp.termination is not None:
        raise ValueError(
            "the MDP has termination: its episodes end, after which nothing is left to average. For episodes one after "
            "the other, let the end lead to the start: transitions + termination[..., None] * initial, and no "
            "termination; for the return of one episode, use solve"
        )
    dtype = mdp.dtype
    mdp = dataclasses.replace(mdp, discount=np.zeros((), dtype), complement=np.ones((), dtype))  # type: ignore[arg-type]
    asked = Tolerance.read(tol, dtype)
    readings.refuse_states_as_lanes(mdp, reg, asked.shape)
    limit = checks.operand("max_steps", loop.read_steps(max_steps), np.int32)
    with jax.debug_infs(False):
        return _solve_average(mdp._with_sparsity(), reg, asked, limit)


@pytrees.options
class Howard(methods.Newton):
    """Newton's method, hence policy iteration [Howard 1960], with a way on where a policy's chain falls apart.

    There `(I - P_pi) x = d` has no solution. With a discount just below 1 in the place of 1 there is one: close to the
    other where that exists, and where it does not a large multiple of what the classes of the chain earn, by which the
    next policy is chosen, as it should be. Lanes whose certificate the last step has not halved take it.
    """

    def propose(self, step: methods.Step, memory: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        """Solution of the policy's linear system, loosely at first."""
        below = 1 - float(jnp.finfo(step.h.dtype).eps) ** (1 / 3)
        stuck = step.half_width > 0.5 * memory[1]
        discount = jnp.where(stuck, below, jnp.ones_like(step.half_width))
        return super().propose(
            dataclasses.replace(step, chain=dataclasses.replace(step.chain, discount=discount)), memory
        )


@jax.jit
def _solve_average(mdp: MDP, reg: Regulariser, tol: Tolerance, limit: Array) -> Average:
    problem = bound_problem.bind(mdp, reg, tol.shape, averaged=True)
    batch = problem.batch
    start = jnp.zeros((mdp.n_states, *batch), mdp.dtype)
    fixed = lax.stop_gradient(problem)
    # A cycle of n states shows no progress before the n-th step.
    patience = int(np.clip(problem.n_states + 32, 200, linear.KRYLOV_STEPS))
    solver = Howard(inner_steps=linear.KRYLOV_STEPS, patience=patience)
    found = lax.stop_gradient(loop.iterate(fixed, solver, tol.broadcast(batch), limit, start))
    lost = found.status >= int(Status.NONFINITE_INPUT)
    h, c, half_width = (jnp.where(lost, 0, x) for x in (found.h, found.c, found.half_width))
    h, c, th, policy, q = attach(*loops.alike((problem, h, c, lost)))
    initial = pytrees.lanes_last(mdp.initial, len(batch), 1)
    masked = jnp.isneginf(problem.regulariser.log_prior)

    def public(x: Array, core: int) -> Array:
        return pytrees.batch_first(implicit.mark(x, lost), core)

    return Average(
        gain=public(c, 0),
        bias=public(h - jnp.sum(initial * h, axis=0)[None], 1),
        lower=public(c - half_width, 0),
        upper=public(c + half_width, 0),
        policy=public(policy, 2),
        perturbation=public(jnp.where(masked, 0, q - th[None]), 2),
        status=found.status,
        steps=found.steps,
    )


@jax.custom_jvp
def attach(problem: BoundProblem, h: Array, c: Array, lost: Array) -> tuple[Array, ...]:
    """One backup at a bias and a gain found elsewhere, with the derivatives of the pair attached.

    Args:
        problem: the lanes, `averaged`.
        h, c: bias and gain, `[S, *B]` and `[*B]`.
        lost: lanes without an answer, `[*B]`, in which h and c are 0.

    Returns:
        h and c as they came, `T h - c [S, *B]`, the policy and `q - c`, both `[A, S, *B]`.
    """
    return h, c, *bellman.backup(problem, h, c)


def _attach_jvp(primals: tuple, tangents: tuple) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    problem, h, c, lost = primals
    change = tangents[0]
    h, c, th, policy, q = found = attach(problem, h, c, lost)
    problem = implicit.harmless(problem, lost)
    policy = jnp.where(lost[None, None], 1 / policy.shape[0], policy)
    q = jnp.where(lost[None, None], 0, q)
    dq = implicit.explicit(problem, change, h)
    dth = problem.regulariser.conjugate_tangent(policy, q + c[None, None], dq, change.regulariser)
    dc, dh = _poisson(problem, policy, jnp.broadcast_to(dth, h.shape), lost)
    ahead = problem.transitions._expect(dh) - dc[None, None]
    dq = ahead if dq is None else dq + ahead
    dpolicy = problem.regulariser.policy_tangent(policy, dq, change.regulariser)
    # dT h - dc = dh at the solution.
    return found, (dh, dc, dh, *(jnp.broadcast_to(x, q.shape) for x in (dpolicy, dq)))


attach.defjvp(_attach_jvp, symbolic_zeros=True)


def _poisson(problem: BoundProblem, policy: Array, b: Array, lost: Array) -> tuple[Array, Array]:
    """Solve `x + g = b + P_pi x` for g, `[*B]`, and x up to a constant, `[S, *B]`, differentiably in everything."""
    chain, home = _homewards(problem, policy, lost)
    zero = jnp.zeros(problem.batch, b.dtype)

    visits = linear.occupy(chain, home, zero, linear.Method())
    unknown = ~jnp.all(jnp.isfinite(lax.stop_gradient(visits)), axis=0)
    visits = jnp.where(unknown[None], home, visits)
    g = pytrees.gate(jnp.sum(visits * b, axis=0) / jnp.sum(visits, axis=0), unknown)
    return g, linear.solve(chain, b - g[None], zero, None, linear.Method())


def _homewards(problem: BoundProblem, policy: Array, lost: Array) -> tuple[bellman.Chain, Array]:
    """The policy's chain, ending where it comes home, and home, `[S, *B]`, 1 in one state and 0 elsewhere."""
    chain = bellman.chain(problem, policy)
    home = lax.stop_gradient(_home(*loops.alike(lax.stop_gradient((chain, lost)))))
    exits = jnp.sum(chain.policy * chain.transitions._expect(home), axis=0)
    chain = dataclasses.replace(
        chain,
        transitions=Absorbed(chain.transitions, 1 - home),
        exit_rate=jnp.where(lost[None], 1, exits),
        backwards=None if chain.backwards is None else Absorbed(chain.backwards, 1 - home),
        ends=True,
    )
    return dataclasses.replace(chain, longest=linear.longest(lax.stop_gradient(chain))), home


def _home(chain: bellman.Chain, lost: Array) -> Array:
    """A state that the chain always comes back to, as `[S, *B]` of 0 and 1: the one where it is most often."""
    n = chain.exit_rate.shape[0]
    even = jnp.full_like(chain.exit_rate, 1 / n)
    b = chain.transpose(even) - even
    tiny = float(jnp.finfo(even.dtype).eps) ** (2 / 3)
    size = jnp.max(jnp.abs(b), axis=0)
    small = jnp.full(size.shape, 0.1 * tiny, even.dtype)
    caps = linear.KRYLOV_STEPS, linear.idle_steps(n)
    found = jnp.maximum(even + krylov.bicgstab(chain.transpose, b, size, small, *caps, True), 0)
    found = found / jnp.sum(found, axis=0)[None]
    found = jnp.where(jnp.all(jnp.isfinite(found), axis=0)[None], found, even)

    # Where that has not found the stationary distribution, staying or moving on by the toss of a coin takes mass there.
    def unsettled(state: tuple[Array, Array]) -> Array:
        mu, count = state
        left = jnp.sum(jnp.abs(chain.transpose(mu) - mu), axis=0)
        return jnp.any((left > tiny) & ~lost) & (count < 4 * n)

    def move(state: tuple[Array, Array]) -> tuple[Array, Array]:
        mu, count = state
        return 0.5 * (mu + chain.transpose(mu)), count + 1

    mu, _ = loops.while_loop(unsettled, move, (found, jnp.asarray(0, jnp.int32)), (chain, lost))
    return jnp.moveaxis(jax.nn.one_hot(jnp.argmax(mu, axis=0), n, dtype=mu.dtype), -1, 0)


@pytrees.dataclass
class Absorbed(Transitions):
    """A bound kernel of which what leads to some states is left out: there it ends.

    Attributes:
        kernel: bound.
        kept: `[S, *B]`, 0 at those states and 1 elsewhere.
    """

    kernel: Any
    kept: Array

    @property
    def n_states(self) -> int:
        return self.kernel.n_states

    @property
    def fan_out(self) -> int:
        """See `Transitions`."""
        return self.kernel.fan_out

    def _expect(self, v: Array) -> Array:
        return self.kernel._expect(self.kept * v)

    def _push(self, mu: Array) -> Array:
        return self.kept * self.kernel._push(mu)

    def _take_lanes(self, index: tuple[Array, ...]) -> "Absorbed":
        return Absorbed(self.kernel._take_lanes(index), pytrees.pick_lanes(self.kept, index))

    def _add_lane_axis(self) -> "Absorbed":
        return Absorbed(self.kernel._add_lane_axis(), self.kept[..., None])
