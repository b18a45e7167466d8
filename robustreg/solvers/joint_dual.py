r"""Regularising the joint occupancy of states and actions: one convex problem in V, by Newton's method [REPS, DICE].

**The problem.** With normalised occupancies `mu(s,a) >= 0`, `sum mu = 1`, and a reference mu0 (where data came from),

    max_mu  <mu, r> - D[mu0 : mu]/beta,     where     sum_a mu(s,a) = (1-g) rho(s) + g sum_{s',a'} P(s|s',a') mu(s',a').

The cost couples the states: it is not the sum over visits of a cost of the policy, so that no Bellman operator has the
answer for a fixed point. Multipliers V of the flow give the dual [Peters, Muelling and Altun 2010; Nachum et al. 2019],

    min_V  F(V) = (1-g) <rho, V> + C(r + g P V - V),      C(x) = max_mu <mu, x> - D[mu0 : mu]/beta,

where C is the conjugate of *one* state that has all pairs for actions and mu0 for a prior: the kernel of a backup,
maximiser and derivatives included. F is smooth, convex, and unconstrained; its gradient is the violation of the flow,
`G = (1-g) rho + (g P - E)^T mu` with `(E V)(s,a) = V(s)`, and its Hessian `H = (g P - E)^T (d mu/dx) (g P - E)`.

**The constant.** `F(V + c) = F(V)`: a normalised mu pays `(1-g) c` for what it starts with. It is chosen so that
`C(x) = 0` at `x = r + g P V - V`. Then x itself is the worst perturbation of the reward, on the boundary of the set
`{C <= 0}`; `r - x + g P V - V = 0` for every pair (indifference); and `(1-g) <rho, V>` is the optimum.

**What can be visited.** A pair that mu0 leaves out, one that may lead to a state with no way on inside mu0, and one of
a state that is not reached has `mu = 0` whatever V is, and the dual would drive V to infinity to say so. They are taken
out beforehand, by two fixed points on the graph. What they leave of mu0, with mass m, costs

    D[mu0 : mu] = m^(1-alpha) D[mu0/m : mu] + log_alpha(1/m)/alpha,

so that only beta and a constant change. V is 0 in states that are out.

**Method.** Newton's method, damped by halving its step until F falls enough, along betas that grow from 1/range(r) by
factors of 4: at a large beta F is nearly a maximum of affine functions, which Newton's method finds its way in from
close by only. Up to 512 states H is written out; beyond, its system is solved by conjugate gradients.

**Derivatives** follow from `G(V; theta) = 0`: `dV = -H^{-1} d_theta G`, one symmetric system in either mode.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from robustreg._core import loops, pytrees
from robustreg.problems.mdps import MDP
from robustreg.problems.transitions import Transitions
from robustreg.regularisers import divergences
from robustreg.regularisers.bound import maximise
from robustreg.solvers import bellman, bound_problem
from robustreg.solvers.bound_problem import BoundProblem
from robustreg.solvers.loop import freeze
from robustreg.solvers.solution import Status

# A lane whose minimisation goes on, or has come to where no step helps.
RUNNING = -1
# States up to which the Hessian is written out; cap on halvings of a step and on steps of CG; growth of beta.
_DENSE, _HALVINGS, _CG, _GROWTH = 512, 30, 400, 4.0
# Share of the decrease promised that a step has to bring.
_ARMIJO = 1e-4


@pytrees.dataclass
class Dual:
    """The dual in the kernels' layout.

    Attributes:
        transitions: bound.
        regulariser: of one state that has all pairs for actions, `[A S, 1, *B]`; its prior is what can be visited of
            the reference.
        reward: `[A, S, *b]`, 0 at pairs that are out.
        discount, complement: `[*b]`.
        initial: `[S, *b]`.
        kept: pairs that can be visited, `[A, S, *B]`.
        offset: what the rest of the reference costs, `[*B]`.
    """

    transitions: Transitions
    regulariser: Any
    reward: Array
    discount: Array
    complement: Array
    initial: Array
    kept: Array
    offset: Array

    def perturbed(self, v: Array) -> Array:
        """Compute `x = r + g P V - V`, `[A, S, *B]`; 0 at pairs that are out."""
        x = self.reward + self.discount[None, None] * self.transitions._expect(v) - v[None]
        return jnp.where(self.kept, x, 0)

    def conjugate(self, v: Array) -> tuple[Array, Array]:
        """Compute `C(x)`, `[*B]`, and its maximiser mu, `[A, S, *B]`."""
        x = self.perturbed(v)
        level, mu = maximise(self.regulariser, x.reshape(-1, 1, *x.shape[2:]))
        return level[0] - self.offset, mu.reshape(x.shape)

    def dual(self, v: Array, level: Array) -> Array:
        """Compute `F(V)`, `[*B]`, of V and C."""
        return self.complement * jnp.sum(self.initial * v, axis=0) + level

    def violation(self, mu: Array) -> Array:
        """Compute the gradient of F, `[S, *B]`, of mu: what flows into a state less what leaves it."""
        mu = jnp.where(self.kept, mu, 0)
        ahead = self.discount[None] * self.transitions._push(mu)
        return self.complement[None] * self.initial + ahead - jnp.sum(mu, axis=0)

    def product(self, mu: Array, y: Array) -> Array:
        """Compute `H y`, `[S, *B]`, where C has the maximiser mu."""
        dx = jnp.where(self.kept, self.discount[None, None] * self.transitions._expect(y) - y[None], 0)
        same = jax.tree.map(lambda x: np.zeros(x.shape, jax.dtypes.float0), self.regulariser)
        flat = (x.reshape(-1, 1, *x.shape[2:]) for x in (mu, dx))
        dmu = self.regulariser.policy_tangent(*flat, same).reshape(mu.shape)
        dmu = jnp.where(self.kept, dmu, 0)
        return self.discount[None] * self.transitions._push(dmu) - jnp.sum(dmu, axis=0)


def bind(mdp: MDP, reg: Any, reference: Array, batch: tuple[int, ...]) -> tuple[Dual, Array]:
    """Lay the dual out for the kernels, and tell in which lanes it has a solution, `[*B]`."""
    whole: Any = bound_problem.bind(mdp, reg, reference.shape[:-2], batch)
    n, core = len(batch), (mdp.n_actions, mdp.n_states)
    mu0 = jnp.broadcast_to(pytrees.lanes_last(reference, n, 2), (*core, *batch))
    mu0 = mu0 / jnp.sum(mu0, axis=(0, 1))[None, None]
    initial = jnp.broadcast_to(pytrees.lanes_last(mdp.initial, n, 1), (core[1], *batch))
    allowed = mu0 > 0
    if mdp.available is not None:
        allowed = allowed & pytrees.lanes_last(mdp.available, n, 2)
    kept, feasible = lax.stop_gradient(_visitable(whole, allowed, initial))
    mass = jnp.sum(jnp.where(kept, mu0, 0), axis=(0, 1))
    none = mass <= 0
    mass = jnp.where(none, 1, mass)
    beta = jnp.broadcast_to(whole.regulariser.beta, (1, *batch))
    alpha = jnp.broadcast_to(whole.regulariser.order, (1, *batch))[0]
    # D[mu0 : mu] = m^(1-alpha) D[mu0/m : mu] + log_alpha(1/m)/alpha, of which `deformed_exp` takes the logarithm.
    complete = jnp.all(kept | ~(mu0 > 0), axis=(0, 1))
    safe = jnp.where(complete, 1, mass)
    positive = jnp.where(alpha > 0, alpha, 1)
    offset = divergences.deformed_exp(-jnp.log(safe), alpha - 1) / (positive * beta[0])
    logs = jnp.where(kept, jnp.log(jnp.where(kept, mu0, 1) / mass[None, None]), -jnp.inf).reshape(-1, 1, *batch)
    joint = dataclasses.replace(whole.regulariser, beta=beta * safe[None] ** (alpha - 1)[None], log_prior=logs)
    sound = bellman.sound(whole) & feasible & ~none & (complete | (alpha > 0))
    sound = sound & jnp.all(jnp.isfinite(mu0) & (mu0 >= 0), axis=(0, 1)) & jnp.all(jnp.isfinite(initial), axis=0)
    sound = sound & jnp.all(jnp.isfinite(jnp.where(kept, whole.reward, 0)), axis=(0, 1))
    reward = jnp.where(kept, jnp.broadcast_to(whole.reward, kept.shape), 0)
    numbers = whole.discount, whole.complement
    return Dual(whole.transitions, joint, reward, *numbers, initial, kept, offset), lax.stop_gradient(sound)


def _visitable(problem: BoundProblem, allowed: Array, initial: Array) -> tuple[Array, Array]:
    """Pairs that some policy inside the reference visits, `[A, S, *B]`, and whether there is such a policy, `[*B]`."""
    p, dtype = problem.transitions, initial.dtype
    # With discount 0 nothing is ahead.
    ahead = jnp.broadcast_to(problem.discount > 0, initial.shape[1:])

    def leads_out(inside: Array) -> Array:
        return (p._expect((~inside).astype(dtype)) > 0) & ahead[None, None]

    def narrow(inside: Array) -> Array:
        return inside & jnp.any(allowed & ~leads_out(inside), axis=0)

    inside = loops.until_stable(narrow, jnp.any(allowed, axis=0), (p, allowed, initial))
    pairs = allowed & ~leads_out(inside) & inside[None]

    def spread(reached: Array) -> Array:
        found = (p._push((pairs & reached[None]).astype(dtype)) > 0) & ahead[None]
        return reached | found

    begun = initial > 0
    reached = loops.until_stable(spread, begun, (p, pairs))
    return pairs & reached[None], jnp.all(inside | ~begun, axis=0)


# ---- Newton's method


class _Search(NamedTuple):
    """Newton's method on its way: V `[S, *B]`, the beta it is at `[1, *B]`, steps since progress, steps, status."""

    v: Array
    beta: Array
    idle: Array
    steps: Array
    status: Array


def minimise(problem: Dual, sound: Array, limit: Array) -> tuple[Array, Array, Array]:
    """Find the V of least dual value, `[S, *B]`; steps taken and status, `[*B]`."""
    batch, dtype = sound.shape, problem.reward.dtype
    reward = jnp.broadcast_to(problem.reward, problem.kept.shape)
    spread = jnp.max(jnp.where(problem.kept, reward, -jnp.inf), axis=(0, 1))
    spread = spread - jnp.min(jnp.where(problem.kept, reward, jnp.inf), axis=(0, 1))
    scale = jnp.where(jnp.isfinite(spread) & (spread > 0), spread, 1)
    first = jnp.minimum(problem.regulariser.beta, (1 / scale)[None])
    count, v = jnp.zeros(batch, jnp.int32), jnp.zeros((problem.kept.shape[1], *batch), dtype)
    status = jnp.where(sound, RUNNING, int(Status.NONFINITE_INPUT)).astype(jnp.int32)

    def running(state: _Search) -> Array:
        return jnp.any(state.status == RUNNING)

    start, turn = _Search(v, first, count, count, status), functools.partial(_turn, problem, limit)
    found = loops.while_loop(running, turn, start, (problem, limit))
    # Ended for want of progress: what it is worth the bounds say.
    return found.v, found.steps, jnp.where(found.status == int(Status.STAGNATED), RUNNING, found.status)


def _turn(problem: Dual, limit: Array, state: _Search) -> _Search:
    """Take one step of Newton's at the state's own beta, shortened until the dual value falls."""
    v, now, wanted = state.v, state.beta, problem.regulariser.beta
    here = dataclasses.replace(problem, regulariser=dataclasses.replace(problem.regulariser, beta=now))
    level, mu = here.conjugate(v)
    g, before = here.violation(mu), here.dual(v, level)
    step = -_inverse(here, mu, g, jnp.sum(jnp.abs(g), axis=0) * 1e-3 * now[0])
    promised = jnp.sum(g * step, axis=0)
    bad = ~(jnp.all(jnp.isfinite(step), axis=0) & (promised < 0))
    step = jnp.where(bad[None], -g / now, step)
    promised = jnp.where(bad, -jnp.sum(g * g, axis=0) / now[0], promised)
    unit = float(jnp.finfo(v.dtype).eps)
    noise = 8 * unit * (jnp.abs(before) + jnp.max(jnp.abs(v), axis=0) + 1 / now[0])
    length, enough = _shortened(here, v, step, before, promised, noise, state.status != RUNNING)
    new = v + jnp.where(enough, length, 0)[None] * step
    new = new - _middle(new)[None]
    # Newton's decrement is twice what is left; a beta that still grows only has to be followed.
    left = -promised * now[0]
    last = (now >= wanted)[0]
    near = (left <= 0.5) & (length == 1)
    done = last & ((-promised <= noise) | (left <= (8 * unit) ** 0.75))
    idle = jnp.where(last & (done | ~enough), state.idle + 1, 0)
    end = jnp.where(state.steps + 1 >= limit, int(Status.MAX_STEPS), RUNNING)
    end = jnp.where(idle > 1, int(Status.STAGNATED), end)
    now = jnp.where((near | ~enough)[None], jnp.minimum(_GROWTH * now, wanted), now)
    fresh = _Search(new, now, idle, state.steps + 1, jnp.where(jnp.isfinite(before), end, int(Status.NONFINITE)))
    return freeze(state.status != RUNNING, state, fresh)


def _shortened(
    here: Dual, v: Array, step: Array, before: Array, promised: Array, noise: Array, skip: Array
) -> tuple[Array, Array]:
    """Halve a step until the dual value falls by a share of what was promised; its length and whether it is enough."""

    def shorter(search: tuple[Array, Array], _: Array) -> tuple[tuple[Array, Array], Array]:
        length, enough = search
        new = v + length[None] * step
        fine = here.dual(new, here.conjugate(new)[0]) <= before + _ARMIJO * length * promised + noise
        fine = enough | fine
        return (jnp.where(fine, length, 0.5 * length), fine), fine

    start = (jnp.ones(skip.shape, v.dtype), skip)
    return loops.until_done(shorter, start, skip, _HALVINGS, (here, v, step))


def _middle(v: Array) -> Array:
    return 0.5 * (jnp.max(v, axis=0) + jnp.min(v, axis=0))


def _inverse(problem: Dual, mu: Array, b: Array, damping: Array) -> Array:
    """Solve `(H + damping) x = b` for `[S, *B]`, where b sums to 0 and so does x, in a metric of H's own scale."""
    return _dense(problem, mu, b, damping) if b.shape[0] <= _DENSE else _iterated(problem, mu, b, damping)


def _dense(problem: Dual, mu: Array, b: Array, damping: Array) -> Array:
    n, batch, dtype = b.shape[0], b.shape[1:], b.dtype
    unit = jnp.eye(n, dtype=dtype).reshape(n, n, *(1,) * len(batch))
    columns = jax.vmap(lambda x: problem.product(mu, jnp.broadcast_to(x, b.shape)))(unit)
    h = jnp.moveaxis(columns, (0, 1), (-1, -2))
    h = 0.5 * (h + jnp.swapaxes(h, -1, -2))
    out = jnp.moveaxis(~jnp.any(problem.kept, axis=0), 0, -1)
    diagonal = jnp.diagonal(h, axis1=-2, axis2=-1)
    top = jnp.max(diagonal, axis=-1, keepdims=True)
    top = jnp.where(top > 0, top, 1)
    # States that are hardly visited have rows of their own size.
    diagonal = jnp.where(out, top, jnp.maximum(diagonal + damping[..., None], 1e-30 * top))
    scale = lax.rsqrt(diagonal)
    eye = jnp.eye(n, dtype=dtype).reshape((1,) * len(batch) + (n, n))
    h = h + jnp.where(out, top, damping[..., None])[..., None] * eye
    h = scale[..., None] * h * scale[..., None, :]
    # Constants, which H loses, in this metric.
    constant = jnp.where(out, 0, 1 / scale)
    constant = constant / jnp.sqrt(jnp.sum(constant**2, axis=-1, keepdims=True))
    h = h + constant[..., None] * constant[..., None, :]
    h = h + 4 * float(jnp.finfo(dtype).eps) * eye
    right = scale * jnp.where(out, 0, jnp.moveaxis(b, 0, -1))
    right = right - constant * jnp.sum(constant * right, axis=-1, keepdims=True)
    x = jnp.linalg.solve(h, right[..., None])[..., 0]
    return jnp.moveaxis(jnp.where(out, 0, scale * x), -1, 0)


def _iterated(problem: Dual, mu: Array, b: Array, damping: Array) -> Array:
    """Solve `(H + damping) x = b` by conjugate gradients, preconditioned by visits."""
    out = ~jnp.any(problem.kept, axis=0)
    top = problem.regulariser.beta[0] * jnp.max(jnp.sum(mu, axis=0), axis=0)
    scale = problem.regulariser.beta * jnp.sum(mu, axis=0) + damping[None]
    scale = jnp.where(out, 1, jnp.maximum(scale, 1e-12 * top[None]))

    def apply(x: Array) -> Array:
        return jnp.where(out, x, problem.product(mu, x) + damping[None] * x)

    def dot(x: Array, y: Array) -> Array:
        return jnp.sum(x * y, axis=0)

    def step(state: tuple[Array, ...], done: Array) -> tuple[tuple[Array, ...], Array]:
        x, r, p, rz = state
        hp = apply(p)
        curve = dot(p, hp)
        done = done | ~(curve > 0)
        a = jnp.where(done, 0, rz / jnp.where(curve > 0, curve, 1))
        x, r = x + a[None] * p, r - a[None] * hp
        z = r / scale
        new = dot(r, z)
        done = done | ~(new > target)
        return (x, r, jnp.where(done[None], p, z + (new / rz)[None] * p), jnp.where(done, rz, new)), done

    b = jnp.where(out, 0, b)
    z = b / scale
    rz = dot(b, z)
    target = 1e-24 * rz if b.dtype.itemsize > 4 else 1e-12 * rz
    x, *_ = loops.until_done(step, (jnp.zeros_like(b), b, z, rz), ~(rz > 0), _CG, (problem, mu, b))
    return jnp.where(out, 0, x)


@jax.custom_jvp
def attach(problem: Dual, v: Array) -> Array:
    """Attach to V, `[S, *B]`, its derivatives as the one of least dual value, whatever the search for it was."""
    return v


@attach.defjvp
def _attach_jvp(primals: tuple[Any, Array], tangents: tuple[Any, Any]) -> tuple[Array, Array]:
    (problem, v), (change, _) = primals, tangents
    # By the differentiable function itself: the rule can then be differentiated in turn.
    v = attach(problem, v)

    def flow(p: Dual) -> tuple[Array, Array]:
        mu = p.conjugate(v)[1]
        return p.violation(mu), mu

    (_, mu), (dg, _) = jax.jvp(flow, (problem,), (change,))
    fixed, at, zero = lax.stop_gradient(problem), lax.stop_gradient(mu), jnp.zeros(v.shape[1:], v.dtype)

    def system(x: Array) -> Array:
        return problem.product(mu, x)

    def solve(_: Any, b: Array) -> Array:
        return _inverse(fixed, at, b, zero)

    return v, -lax.custom_linear_solve(system, jnp.broadcast_to(dg, v.shape), solve, symmetric=True)
