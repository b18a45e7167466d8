r"""Transitions that are uncertain within a ball: what the worst of them takes off, and which they are.

An adversary adds to the rows of P, state by state, a noise dP of p-norm at most b [Derman, Geist and Mannor 2021;
Kumar, Levy, Wang and Mannor 2022]. What that costs is a norm of the value,

    r2:     any noise                 b ||V||_q,                  1/p + 1/q = 1
    kappa:  noise that sums to 0      b min_w ||V - w||_q         (q = 2: the deviation from the mean; 1: from the
                                                                   median; infinity: half of the range)

times the discount. If every pair has its own budget (`sa`), it is taken off q(s,a). If the actions of a state share one
(`s`), it is weighted by `||pi||_q`: the ball is then a *regulariser* of that radius, added to the one there is, and the
step is that of `norms`. "kappa" leaves rows that sum to what they did, though not positive ones: both are cautious
closed forms of the exact set, r2 by far the more (`benchmarks/robust.py`).

**The operator.** T is still a maximum of one-step returns, but no longer monotone. Moving V by x moves the norm by at
most `S^(1/q) x`, so that T contracts by

    L = g (1 + max_s b(s) S^(1/q))

where that is less than 1 [Derman, Geist and Mannor 2021, prop. 5.1]; radii for which it is not are refused. The
certificate is that of `bellman` with L for g (the horizon is 1/(1-L)); with kappa T still commutes with constants up to
g, so that the residual may be centred first.

**The worst model.** At V the noise is `dP(s,a,.) = -b (pi_a/||pi||_q)^(q-1) k` (for `sa`: `-b k`), with k the slope of
the norm at V: one vector for all pairs, so that K = dT/dV is that of P less a product of two vectors. Newton's method
and gradients solve with it as with any other.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from robustreg._core import checks, pytrees, roots
from robustreg.problems.dense import Dense
from robustreg.problems.mdps import MDP
from robustreg.problems.successors import BoundSuccessors
from robustreg.problems.transitions import Transitions
from robustreg.regularisers import parameters
from robustreg.regularisers.bound import Bound
from robustreg.regularisers.norms import BoundNorm
from robustreg.regularisers.sums import BoundSum
from robustreg.solvers import exact_balls, greedy_balls, listed_balls, shared_balls
from robustreg.solvers.chains import Product
from robustreg.solvers.exact_balls import ExactBall
from robustreg.solvers.greedy_balls import GreedyBall
from robustreg.solvers.listed_balls import ListedBall
from robustreg.solvers.plain import FixedPolicy, HardMax
from robustreg.solvers.shared_balls import SharedBall

_FORMS, _KINDS = ("r2", "kappa", "exact"), ("s", "sa")


@pytrees.dataclass
class TransitionBall:
    """Describe noise in every row of the transitions, for `solve(..., ambiguity=)` and `evaluate(..., ambiguity=)`.

    Attributes:
        radius: of the noise on a row of P (on all rows of a state together, if rectangular is "s"), `[*B]`, finite and
            not negative.
        p: norm of the ball, from 1 to infinity (1 is twice the total variation), or "kl": a bound on the relative
            entropy of a row to that of P ("exact" alone).
        rectangular: "s" where the actions of a state share the radius, "sa" where every pair has its own.
        form: "kappa", for noise that sums to 0 (the value's deviation from a constant is penalised), "r2", for any
            noise (the value itself is, so that adding a constant to the reward is no longer harmless), or "exact", for
            rows that stay probabilities (p = 1, 2, infinity or "kl"; see `exact_balls`; "s" in `shared_balls`, where
            p = 1 is not there). Time and memory are then those of rows written out, `S^2 A`, but for lists of few
            successors (p = 1, infinity, "kl"); where rows share a radius, a solve takes 10 to 30 times as long.
        per_state: `[*B, S]`, not negative; multiplies the radius. None is 1.
        per_pair: `[*B, S, A]`, not negative; multiplies the radius ("sa" alone). None is 1.
    """

    radius: Any
    p: float | str = pytrees.static(default=2.0)
    rectangular: str = pytrees.static(default="s")
    form: str = pytrees.static(default="kappa")
    per_state: Any = None
    per_pair: Any = None

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Leading batch axes of all leaves together."""
        shapes = [jnp.shape(self.radius)]
        shapes += [] if self.per_state is None else [self.per_state.shape[:-1]]
        shapes += [] if self.per_pair is None else [self.per_pair.shape[:-2]]
        batch: Any = jnp.broadcast_shapes(*shapes)
        return batch

    def bind(self, batch_ndim: int, dtype: Any, transitions: Transitions) -> "Balls":
        """Lay it out for the kernels, with bound transitions: radius `[A or 1, S or 1, *b]`."""
        if self.form != "exact":
            return self._laid_out(batch_ndim, dtype, transitions.n_states)
        if self.rectangular == "s" and self.p in shared_balls.KINDS:
            return SharedBall(self._radii(batch_ndim, dtype), transitions._rows(batch_ndim, dtype), self.p)
        # (A bound on every entry is none that rows share.)
        # Lists cost the square of their length for each row, rows that are written out S sqrt(S).
        if isinstance(transitions, BoundSuccessors) and self.p in listed_balls.KINDS:
            if transitions.fan_out**4 <= transitions.n_states**3:
                return listed_balls.listed(self._radii(batch_ndim, dtype), transitions, self.p)
        return written_out(self._radii(batch_ndim, dtype), transitions, self.p)

    def _laid_out(self, batch_ndim: int, dtype: Any, n_states: int) -> "BoundBall":
        radius = self._radii(batch_ndim, dtype)
        return BoundBall(radius, float(self.p), self.rectangular, self.form, n_states)

    def _radii(self, batch_ndim: int, dtype: Any) -> Array:
        radius = pytrees.lanes_last(jnp.asarray(self.radius, dtype)[..., None, None], batch_ndim, 2)
        for scale, core in ((self.per_state, 1), (self.per_pair, 2)):
            if scale is not None:
                laid = pytrees.lanes_last(jnp.asarray(scale, dtype), batch_ndim, core)
                radius = radius * (laid[None] if core == 1 else laid)
        return radius


@pytrees.dataclass
class BoundBall:
    """A ball of transitions in the kernels' layout; `radius [A or 1, S or 1, *b]`."""

    radius: Array
    p: float = pytrees.static()
    rectangular: str = pytrees.static()
    form: str = pytrees.static()
    n_states: int = pytrees.static()

    @property
    def q(self) -> float:
        """The dual exponent."""
        return _dual_exponent(self.p)

    @property
    def keeps_constants(self) -> bool:
        """Whether T commutes with constants up to g."""
        return self.form == "kappa"

    def rounding(self, discount: Array, size: Array) -> Array:
        """Bound what the cost of a value of that size errs by, in units of u: a sum of S powers, and its root."""
        n = self.n_states
        return 4 * (4 + min(n, 4 * n**0.5)) * (self.contraction(discount, n) - discount) * size

    def worst(self, h: Array, c: Array) -> tuple[Array, Array]:
        """Measure `V = h + c`, `[*B]`, with the slope of that, `[S, *B]`, of which all worst noise is a multiple."""
        x = h + c[None] if self.form == "r2" else h - _centre(h, self.q)[None]
        return _norm(x, self.q)

    def contraction(self, discount: Array, n_states: int) -> Array:
        """Bound the modulus of the operator, `[*b]`; 1 or more where none is known."""
        widest = jnp.max(self.radius, axis=(0, 1))
        return discount * (1 + widest * float(n_states) ** (1 / self.q))

    def expected(self, transitions: Transitions, h: Array, worst: tuple[Array, Array]) -> Array:
        """Compute what the worst rows lead to expect of h, `[A, S, *B]`; for "s" `P h`."""
        ahead = transitions._expect(h)
        return ahead - self.radius * worst[0][None, None] if self.rectangular == "sa" else ahead

    def operator(self, reg: Bound, discount: Array, worst: tuple[Array, Array]) -> Bound:
        """Return the regulariser, to which noise that the actions of a state share is added."""
        if self.rectangular == "sa":
            return reg
        return _with_radius(reg, discount[None] * self.radius[0] * worst[0][None], self.p)

    def noise(self, policy: Array, worst: tuple[Array, Array]) -> Array:
        """Write out the noise that costs a policy most, `[A, S, S, *B]`."""
        share = jnp.ones_like(policy) if self.rectangular == "sa" else _norm(policy, self.q)[1]
        return (-self.radius * share)[:, :, None] * worst[1][None, None]

    def pull(self, policy: Array, discount: Array, worst: tuple[Array, Array]) -> Product:
        """Find what K loses against that of P."""
        if self.rectangular == "sa":
            weight = pytrees.total(policy * jnp.broadcast_to(self.radius, policy.shape))
        else:
            weight = _norm(policy, self.q)[0] * self.radius[0]
        return Product(discount[None] * weight, worst[1])


Balls = BoundBall | ExactBall | GreedyBall | ListedBall | SharedBall


def _dual_exponent(p: float) -> float:
    """The q with 1/p + 1/q = 1."""
    return math.inf if p == 1 else 1.0 if math.isinf(p) else p / (p - 1)


def _norm(x: Array, q: float) -> tuple[Array, Array]:
    """`||x||_q` over the leading axis, `[...]`, and its slope in x."""
    size = jnp.abs(x)
    sign = jnp.sign(x)
    if q == 1:
        return jnp.sum(size, axis=0), lax.stop_gradient(sign)
    if math.isinf(q):
        top = jnp.max(size, axis=0)
        at = lax.stop_gradient((size == top[None]).astype(x.dtype) * sign)
        return top, at / jnp.maximum(jnp.sum(jnp.abs(at), axis=0), 1)[None]
    top = lax.stop_gradient(jnp.max(size, axis=0))
    scale = jnp.where(top > 0, top, 1)
    # (The root of a sum of 0 has no derivative, and none is wanted.)
    share = jnp.where(size > 0, size, 0) / scale[None]
    total = jnp.sum(share**q, axis=0)
    norm = jnp.where(total > 0, total, 1) ** (1 / q)
    slope = sign * (share / norm[None]) ** (q - 1)
    return jnp.where(total > 0, scale * norm, 0), jnp.where((total > 0)[None], slope, 0)


def _centre(h: Array, q: float) -> Array:
    """The w that makes `||h - w||_q` smallest, `[...]`."""
    low, high = jnp.min(h, axis=0), jnp.max(h, axis=0)
    if math.isinf(q):
        return 0.5 * (low + high)
    if q == 2:
        return jnp.mean(h, axis=0)
    return jnp.median(h, axis=0) if q == 1 else _balance(h, q)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _balance(h: Array, q: float) -> Array:
    """The w at which powers `q - 1` of the deviations on both sides sum to the same."""

    def above(middle: Array) -> Array:
        x = h - middle[None]
        width = jnp.max(jnp.abs(x), axis=0)
        x = x / jnp.where(width > 0, width, 1)[None]
        return ~(jnp.sum(jnp.sign(x) * jnp.abs(x) ** (q - 1), axis=0) > 0)

    low, high = roots.bisect(above, jnp.min(h, axis=0), jnp.max(h, axis=0), like=h)
    return 0.5 * (low + high)


@_balance.defjvp
def _balance_jvp(q: float, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """It moves as the mean does, with weights `|h - w|^(q - 2)`."""
    w = _balance(*primals, q)
    x = jnp.abs(primals[0] - w[None])
    top = lax.stop_gradient(jnp.max(x, axis=0, keepdims=True))
    least = float(jnp.finfo(x.dtype).tiny) ** 0.5
    weight = jnp.maximum(x / jnp.where(top > 0, top, 1), least) ** (q - 2)
    return w, jnp.sum(weight * tangents[0], axis=0) / jnp.sum(weight, axis=0)


def _with_radius(reg: Bound, radius: Array, p: float) -> Bound:
    """A bound regulariser with a ball of a radius `[S, *B]` added to it."""
    tiny = float(jnp.finfo(radius.dtype).tiny)
    if isinstance(reg, FixedPolicy):
        norm = _norm(reg.policy, _dual_exponent(p))[0]
        return FixedPolicy(reg.policy, reg.cost + radius * norm, reg.beta, reg.log_prior)
    if isinstance(reg, BoundNorm) and reg.p == p:
        return BoundNorm(1 / jnp.maximum(1 / reg.beta + radius, tiny), reg.log_prior, p)
    ball = BoundNorm(1 / jnp.maximum(radius, tiny), reg.log_prior, p)
    if isinstance(reg, HardMax):
        return ball
    refuse_sum(reg, p)
    parts = reg.parts if isinstance(reg, BoundSum) else (reg,)
    return BoundSum((*parts, ball), False)


def refuse_sum(reg: Bound, p: float) -> None:
    """Refuse a regulariser to which a ball of transitions cannot be added."""
    parts = reg.parts if isinstance(reg, BoundSum) else (reg,)
    if p == 1 or any(isinstance(part, BoundNorm) for part in parts):
        raise TypeError(
            'a ball of transitions with rectangular="s" is added to the regulariser, as a norm of the policy: with '
            'p = 1, or beside a norm ball of another p, that sum is not there; take another p, or "sa"'
        )


def written_out(radius: Array, transitions: Transitions, p: float | str) -> ExactBall | GreedyBall:
    """Make the exact balls of a radius `[A or 1, S or 1, *b]` around the rows of a bound kernel."""
    rows = transitions._rows(radius.ndim - 2, radius.dtype)
    if p in greedy_balls.KINDS:
        return greedy_balls.greedy(radius, Dense(jnp.moveaxis(rows, (1, 0, 2), (-3, -2, -1))), p)
    return ExactBall(radius, rows, p)


def checked(ball: Any, mdp: MDP) -> TransitionBall:
    """Read the ambiguity set of an MDP: with arrays for numbers, all in range.

    Raises:
        TypeError, ValueError: what is none, or of other sizes; numbers or names out of range; radii for which no
            contraction is known.
    """
    if not isinstance(ball, TransitionBall):
        raise TypeError(f"ambiguity must be a robustreg.TransitionBall, got {type(ball).__name__}")
    if ball.p != "kl" and not (isinstance(ball.p, (int, float)) and ball.p >= 1):
        raise ValueError(f'the p of a TransitionBall must be a number from 1 to infinity or "kl", got {ball.p!r}')
    for name, value, allowed in (("rectangular", ball.rectangular, _KINDS), ("form", ball.form, _FORMS)):
        if value not in allowed:
            raise ValueError(f"{name} of a TransitionBall must be one of {allowed}, got {value!r}")
    if ball.form == "exact" and ball.p not in (*greedy_balls.KINDS, *exact_balls.KINDS):
        raise ValueError('form "exact" is there for p = 1, 2, infinity or "kl"')
    if ball.form == "exact" and ball.rectangular == "s" and ball.p == 1:
        raise ValueError('form "exact" is there for p = 2, infinity or "kl" with rectangular="s": p = 1 needs "sa"')
    if ball.form != "exact" and ball.p == "kl":
        raise ValueError('p="kl" is no norm: it is there for form="exact"')
    if ball.per_pair is not None and ball.rectangular == "s":
        raise ValueError('a radius per pair asks for rectangular="sa": in "s" the actions of a state share one')
    sizes: dict[str, Any] = {}
    pairs = (mdp.n_states, mdp.n_actions)
    for name, core in (("radius", ()), ("per_state", pairs[:1]), ("per_pair", pairs)):
        x = getattr(ball, name)
        if x is None:
            continue
        x = sizes[name] = parameters.number(name, x)
        parameters.refuse(name, x, lambda v: ~((v >= 0) & (v < jnp.inf)), "must be finite and not negative")
        if x.shape[x.ndim - len(core) :] != core:
            raise ValueError(f"{name} of the ball has shape {x.shape}; expected [*B, {', '.join(map(str, core))}]")
    ball = dataclasses.replace(ball, p=ball.p if ball.p == "kl" else float(ball.p), **sizes)
    _refuse_radius(ball, mdp.discount, mdp.n_states)
    return ball


def _refuse_radius(ball: TransitionBall, discount: Array, n_states: int) -> None:
    """Refuse concrete radii for which no contraction is known, naming the bound and the largest one that passes."""
    if checks.is_traced(ball, discount) or ball.form == "exact":
        return
    axes = len(jnp.broadcast_shapes(ball.batch_shape, jnp.shape(discount)))
    bound = ball._laid_out(axes, discount.dtype, n_states)
    width = float(n_states) ** (1 / bound.q)
    widest = jnp.max(bound.radius, axis=(0, 1))
    most = (1 / discount - 1) / width
    if bool(jnp.any(~(widest < most))):
        raise ValueError(
            f"ambiguity: a radius of {float(jnp.max(widest)):.3g} is too large for a contraction: "
            f"g (1 + radius S^(1/q)) must be below 1, here with q = {bound.q:g}, S = {n_states} and a discount up to "
            f"{float(jnp.max(discount)):.6g}; the largest radius that passes is {float(jnp.min(most)):.6g}"
        )
