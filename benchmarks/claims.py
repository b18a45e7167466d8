"""What `honesty.py` holds the library to: a function for every part of it, which fills the table of `tallies.py`."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import reference
from reference import LD
from tallies import Batch, extent, finite

# ---------------------------------------------------------------------------------------------------------------
# the optimum


def solution(batch: Batch, sol: Any, name: str) -> None:
    """Bounds of a solve, and their width where it CONVERGED."""
    lower, upper = (np.asarray(x, LD) for x in (sol.lower, sol.upper))
    converged = np.asarray(sol.converged)
    size = np.abs(batch.truth.upper).max(-1).astype(float)
    beyond = np.maximum(np.maximum(lower - batch.truth.upper, batch.truth.lower - upper), lower - upper).max(-1)
    # A lane that says CONVERGED has no right to NaN.
    answered = finite(lower, upper) | converged
    sharp = (width_of(batch.truth) <= 0.5 * (upper - lower).max(-1)) | ~finite(lower, upper)
    batch.record(f"{name}: lower <= V* <= upper", beyond, size, answered, sharp)
    width = "solve: CONVERGED, upper - lower <= 2 tol" if name == "solve" else f"{name}: upper - lower <= 2 tol"
    written = 8 * batch.unit * np.abs(np.stack([lower, upper])).max((0, 2))
    excess = (upper - lower).max(-1) - 2 * np.asarray(sol.tol, LD) - written
    batch.record(width, excess, np.asarray(sol.tol), applies=converged)


def width_of(truth: reference.Answer) -> np.ndarray:
    """Width of the reference's own interval, `[B]`."""
    return (truth.upper - truth.lower).max(-1).astype(float)


def certificates(batch: Batch) -> None:
    """`certify` of the solution, and its verdict."""
    proof = batch.rr.certify(batch.mdp, batch.reg, batch.sol)
    lower, upper = (np.asarray(x, LD) for x in (proof.lower, proof.upper))
    answered, size = finite(lower, upper), np.abs(batch.truth.upper).max(-1).astype(float)
    policy = np.asarray(batch.sol.policy, LD)
    value, error, missing, cost = guaranteed(batch, policy)
    order = 1 + np.abs(batch.draw.exact.alpha)
    spread = batch.reward + extent(value) + order * cost
    allowed = error + missing * spread * batch.draw.exact.horizon
    width = (upper - lower).max(-1)
    known, sharp = width_of(batch.truth) <= 0.5 * width, error <= 0.5 * (allowed - error + width)
    beyond = (lower - value).max(-1) - allowed
    batch.record("certify: lower <= policy's guarantee", beyond, size, answered, sharp, finite(policy))
    batch.record("certify: V* <= upper", (batch.truth.lower - upper).max(-1), size, answered, known)
    batch.record("certify: lower <= upper", (lower - upper).max(-1), size, answered)
    limit = np.asarray(batch.sol.tol, float) + np.asarray(proof.rounding, float).reshape(len(lower), -1).max(-1)
    loose = ~_passes(batch, proof, limit)
    worst = np.where(loose, (upper - lower).max(-1).astype(float) / 2, 0)
    claim = "certify: CONVERGED passes tol + rounding"
    batch.record(claim, np.where(loose, np.fmax(worst, 1e-300), 0), limit, answered, applies=batch.sol.converged)


def _passes(batch: Batch, proof: Any, limit: np.ndarray) -> np.ndarray:
    """Whether `raise_if_loose` lets each lane pass, `[B]`."""
    import jax

    host = jax.tree.map(np.asarray, proof)

    def passes(lane: int) -> bool:
        try:
            jax.tree.map(lambda x: x[lane], host).raise_if_loose(limit[lane])
        except batch.rr.SolveError:
            return False
        return True

    return np.array([passes(lane) for lane in range(len(limit))])


@dataclass
class Claimed:
    """A policy with a value for `certify`, from a user and not from `solve`."""

    value: Any
    policy: Any
    perturbation: Any


def certificate_of_policy(batch: Batch, value: np.ndarray) -> None:
    """`certify` of a random policy at its own regularised value."""
    claimed = Claimed(value, batch.draw.policy, np.zeros_like(batch.draw.policy))
    proof = batch.rr.certify(batch.mdp, batch.reg, claimed)
    lower, upper = (np.asarray(x, LD) for x in (proof.lower, proof.upper))
    answered, size = finite(lower, upper), np.abs(batch.truth.upper).max(-1).astype(float)
    exact, error, _, cost = guaranteed(batch, batch.draw.policy.astype(LD))
    width = (upper - lower).max(-1)
    known, sharp = error <= 0.5 * width, width_of(batch.truth) <= 0.5 * width
    applies = finite(cost)  # a policy that omits an action costs an infinite amount where alpha <= 0
    claim = "certify, random policy: lower <= guarantee"
    batch.record(claim, (lower - exact).max(-1) - error, np.abs(exact).max(-1), answered, known, applies)
    beyond = (batch.truth.lower - upper).max(-1)
    batch.record("certify, random policy: V* <= upper", beyond, size, answered, sharp, applies)


# ---------------------------------------------------------------------------------------------------------------
# fixed policies


def guaranteed(batch: Batch, policy: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Regularised value of a policy (divided by its sum) `[B, S]`, bound on its error, `|sum p - 1|`, largest cost."""
    exact = batch.draw.exact
    total = policy.sum(-1, keepdims=True)
    policy = policy / total
    order = np.broadcast_to(exact.alpha[:, None], policy.shape[:2])
    with np.errstate(all="ignore"):
        cost = reference.divergence(order, exact.prior, policy) / exact.beta[:, None]
        value, error = reference.evaluate(exact, policy, (policy * exact.reward).sum(-1) - cost)
    missing = np.abs(total - 1).max((1, 2)).astype(float)
    return value, error.astype(float), missing, cost.max(-1).astype(float)


def values(batch: Batch, policy: Any, whose: str) -> np.ndarray:
    """`evaluate`, plain and regularised; the regularised value comes back."""
    exact, u, rr = batch.draw.exact, batch.unit, batch.rr
    given = np.asarray(policy, LD)
    p = given / given.sum(-1, keepdims=True)
    plain, error = reference.evaluate(exact, p, (p * exact.reward).sum(-1))
    got = np.asarray(rr.evaluate(batch.mdp, policy), LD)

    def allowed(value: np.ndarray) -> np.ndarray:
        steps = 32 * u * (batch.reward + extent(value)) * exact.horizon
        return steps + 16 * u * np.abs(value).max(-1).astype(float)

    size, applies = np.abs(plain).max(-1).astype(float) + batch.reward, finite(given)
    beyond = np.abs(got - plain).max(-1) - error - allowed(plain)
    batch.record(f"evaluate, {whose} policy", beyond, size, finite(got), error <= 0.5 * allowed(plain), applies)
    value, error, _, cost = guaranteed(batch, given)
    with np.errstate(all="ignore"):
        power, summands = _summands(batch, p)
        extra = (u * power * summands + _noise(batch).max(-1).astype(float)) * exact.horizon
        got = np.asarray(rr.evaluate(batch.mdp, policy, reg=batch.reg), LD)
        beyond = np.abs(got - value).max(-1) - error - allowed(value) - extra
        known = error <= 0.5 * (allowed(value) + extra)
    claim = f"evaluate regularised, {whose} policy"
    size = np.abs(value).max(-1).astype(float) + batch.reward
    batch.record(claim, beyond, size, finite(got), known, applies & finite(cost))
    return np.asarray(got, batch.draw.P.dtype)


def _summands(batch: Batch, policy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What D/beta is a sum of, in size, and units of rounding that each may err by: `[B]` both, largest over states.

    `p^alpha p0^(1-alpha)` is made of logarithms, whose own rounding is a unit of each.
    """
    exact = batch.draw.exact
    on = (policy > 0) & (exact.prior > 0)
    ratio = np.where(on, np.log(np.where(on, policy, 1)) - np.log(np.where(on, exact.prior, 1)), 0)
    order = exact.alpha[:, None, None]
    forward, mirror = np.where(order >= 0.5, order, 1), np.where(order >= 0.5, 0, order)
    one = policy * np.abs(reference.log_alpha(forward - 1, ratio)) / forward
    two = exact.prior * np.abs(reference.log_alpha(mirror, ratio)) / (1 - mirror)
    size = np.where(order >= 0.5, one, two).sum(-1).max(-1) / exact.beta
    logs = np.where(on, -np.log(np.where(on, exact.prior, 1)), 0)
    power = 16 + 4 * (np.abs(order * ratio) + logs).max((1, 2))
    return power.astype(float), size.astype(float)


def visits(batch: Batch, policy: Any, whose: str) -> None:
    """`occupancy` in the 1-norm."""
    given = np.asarray(policy, LD)
    total = given.sum(-1, keepdims=True)
    p = given / total
    d, error = reference.visits(batch.draw.exact, p)
    got = np.asarray(batch.rr.occupancy(batch.mdp, policy), LD)
    size = d.sum(-1).astype(float)
    missing = np.abs(total - 1).max((1, 2)).astype(float)
    relative = batch.close + 2 * missing * batch.draw.exact.horizon
    beyond = np.abs(got - d[..., None] * p).sum((1, 2)) - error - relative * size
    known = finite(d, error) & (error <= 0.1 * batch.close * size)
    batch.record(f"occupancy, {whose} policy", beyond, size, finite(got), known, finite(given))


# ---------------------------------------------------------------------------------------------------------------
# perturbations


def perturbations(batch: Batch, rng: np.random.Generator) -> np.ndarray:
    """Random `dr [B, S, A]` of the sizes of the reward and of 1/beta: on the boundary of the robust set, in it, out."""
    exact, dtype = batch.draw.exact, batch.draw.P.dtype
    lanes = len(exact.beta)
    sizes = np.stack([batch.draw.scale, np.clip(1 / exact.beta.astype(float), 1e-9, 1e9)])
    size = np.where(rng.random(lanes) < 0.5, *sizes)[:, None, None] * 10 ** rng.uniform(-1, 1, (lanes, 1, 1))
    x = rng.standard_normal(exact.reward.shape) * size
    top = _conjugate(batch, x)[1].astype(float)[..., None]
    shift = rng.integers(4, size=(lanes, 1, 1)).choose([0 * top, top, top + 0.1 * size, top - 0.1 * size])
    return np.where(exact.prior > 0, x - shift, 0).astype(dtype)


def _conjugate(batch: Batch, x: np.ndarray, beta: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    exact = batch.draw.exact
    order = np.broadcast_to(exact.alpha[:, None], x.shape[:2])
    strength = np.broadcast_to(exact.beta[:, None], x.shape[:2]) if beta is None else beta.astype(LD)
    return reference.conjugate(x, order, strength, exact.prior)


def _logs(batch: Batch) -> np.ndarray:
    """Largest `|log p0|`, `[B, S]`: priors are kept as logarithms, and err by so many units."""
    prior = batch.draw.exact.prior
    return np.abs(np.log(np.where(prior > 0, prior, 1))).max(-1)


def _noise(batch: Batch) -> np.ndarray:
    """What those units do to a divergence that is 0, in reward units, `[B, S]`: their square."""
    return 64 * (batch.unit * (1 + _logs(batch))) ** 2 / batch.draw.exact.beta[:, None]


def _near(batch: Batch, x: np.ndarray) -> np.ndarray:
    """What the slack of a perturbation may err by, `[B, S]`: powers `p0^-h` have exponents of `|h log p0|`."""
    size = np.abs(np.where(batch.draw.exact.prior > 0, x, 0)).max(-1)
    powers = 1 + np.abs(batch.draw.exact.alpha[:, None] - 1)
    return batch.unit * (128 + 4 * powers * _logs(batch)) * size + _noise(batch)


def slacks(batch: Batch, dr: np.ndarray) -> None:
    """`slack` against the reference's conjugate, and the critical beta against its sign."""
    low, high = _conjugate(batch, dr.astype(LD))
    got, near = -np.asarray(batch.rr.slack(batch.reg, dr), LD), _near(batch, dr)
    beyond = (np.maximum(got - high, low - got) - near).max(-1)
    size = np.abs(dr).max((1, 2))
    batch.record("slack", beyond, size, finite(got), (high - low <= 0.5 * near).all(-1))
    critical = np.asarray(batch.rr.critical_beta(batch.reg, dr), LD)
    # Zero and infinity say that it, or it times dr, lies beyond what the precision (in double, 1e+-150) can hold.
    share, ends = (1e-9 if batch.precise else 1e-4), np.finfo(dr.dtype)
    largest = np.abs(np.where(batch.draw.exact.prior > 0, dr, 0)).max(-1).astype(LD)
    most = min(float(ends.max) / 4, 1e150) / np.maximum(largest, 1)
    at = np.where(np.isnan(critical), 1, critical)
    at = np.clip(at, max(float(ends.tiny), 1e-150), np.where(np.isinf(critical), most, np.inf))
    inside = np.where(critical > 0, _conjugate(batch, dr.astype(LD), at * (1 - share))[0], -np.inf)
    outside = np.where(critical < np.inf, _conjugate(batch, dr.astype(LD), at * (1 + share))[1], np.inf)
    beyond = (np.maximum(inside, -outside) - near).max(-1)
    answered = ~np.isnan(critical).any(-1)
    batch.record("critical_beta: Omega* changes sign", beyond, size, answered, ~np.isnan(beyond))


def guarantees(batch: Batch, dr: np.ndarray) -> None:
    """`guarantee` of the random policy under `reward - dr`."""
    exact, u, policy = batch.draw.exact, batch.unit, batch.draw.policy.astype(LD)
    deployed = batch.draw.reward - dr
    got = batch.rr.guarantee(batch.mdp, batch.reg, batch.draw.policy, deployed)
    x = np.where(exact.prior > 0, batch.draw.reward.astype(LD) - deployed.astype(LD), 0)
    low, high = _conjugate(batch, x)
    d, error = reference.visits(exact, policy)
    room = -(low + high) / 2
    total, slips = (d * room).sum(-1), (d * ((high - low) + _near(batch, x))).sum(-1)
    # Visits that err by so much in the 1-norm may do so in any state.
    size = d.sum(-1) * np.abs(room).max(-1)
    off = batch.close * size + slips + error * np.abs(room).max(-1)
    answer = np.asarray(got.total_slack, LD)
    known = finite(total, off) & (error <= 0.1 * batch.close * d.sum(-1))
    batch.record("guarantee: total_slack", np.abs(answer - total) - off, size, finite(answer), known)
    reward = np.where(exact.prior > 0, deployed, 0).astype(LD)
    value, slip = reference.evaluate(exact, policy, (policy * reward).sum(-1))
    promised, promised_slip, _, cost = guaranteed(batch, policy)
    with np.errstate(all="ignore"):
        power, summands = _summands(batch, policy)
        sizes = batch.reward + np.abs(reward).max((1, 2)).astype(float) + extent(value) + extent(promised)
        steps = u * (32 * sizes + power * summands) * exact.horizon
        steps = steps + 16 * u * (np.abs(value).max(-1) + np.abs(promised).max(-1))
        known = known & (slip + promised_slip <= 0.5 * (off + steps))
        steps = steps + slip + promised_slip
        actual, bound = np.asarray(got.actual, LD), np.asarray(got.bound, LD)
        beyond = bound - actual - off - steps
        answered = finite(actual, bound)
        size = np.abs(value).max(-1) + np.abs(promised).max(-1)
        batch.record("guarantee: actual >= bound", beyond, size, answered, known, finite(cost))
        # The library's own words against the true values.
        margin = ((value - promised) * exact.initial).sum(-1)
        beyond = -margin - off - steps - 64 * u * (np.abs(actual) + np.abs(np.asarray(got.guaranteed, LD)))
    covered = np.asarray(got.covered) & finite(cost)
    batch.record("guarantee: covered, so margin >= 0", beyond, size, answered, known, covered)


# ---------------------------------------------------------------------------------------------------------------
# derivatives


def derivatives(batch: Batch, rng: np.random.Generator) -> None:
    """Both modes of the derivative of a solve's objective in the reward: visits of its policy."""
    import dataclasses

    import jax
    import jax.numpy as jnp

    def objective(reward: Any) -> Any:
        return batch.rr.solve(dataclasses.replace(batch.mdp, reward=reward), batch.reg).objective

    reward = jnp.asarray(batch.draw.reward)
    converged = np.asarray(batch.sol.converged)
    gradient = np.asarray(jax.grad(lambda r: objective(r).sum())(reward), LD)
    given = np.asarray(batch.sol.policy, LD)
    p = given / given.sum(-1, keepdims=True)
    d, error = reference.visits(batch.draw.exact, p)
    size = d.sum(-1).astype(float)
    missing = np.abs(given.sum(-1) - 1).max(-1).astype(float)
    width = np.asarray(batch.sol.upper - batch.sol.lower, float).max(-1)
    moved = np.minimum(batch.draw.exact.beta.astype(float) * width, 1e-3)
    relative = batch.close + moved + 2 * missing * batch.draw.exact.horizon
    known = finite(d, error) & (error <= 0.1 * batch.close * size)
    beyond = np.abs(gradient - d[..., None] * p).sum((1, 2)) - error - relative * size
    claim = "gradient in the reward = occupancy"
    batch.record(claim, beyond, size, finite(gradient), known, converged)
    direction = np.where(batch.draw.prior > 0, rng.choice([-1.0, 1.0], reward.shape), 0).astype(reward.dtype)
    along = np.asarray(jax.jvp(objective, (reward,), (jnp.asarray(direction),))[1], LD)
    beyond = np.abs(along - (d[..., None] * p * direction).sum((1, 2))) - error - relative * size
    batch.record("derivative along a direction, forwards", beyond, size, finite(along), known, converged)


def game(batch: Batch) -> None:
    """`solve_game`: both bounds hold, however well it was played."""
    played = batch.rr.solve_game(batch.mdp, batch.reg, steps=30)
    primal, dual = (np.asarray(x, LD) for x in (played.primal, played.dual))
    exact = batch.draw.exact
    low, high = ((exact.initial * x).sum(-1) for x in (batch.truth.lower, batch.truth.upper))
    size = np.abs(batch.truth.upper).max(-1).astype(float)
    steps = 32 * batch.unit * (batch.reward + extent(batch.truth.upper)) * exact.horizon + 16 * batch.unit * size
    beyond = np.maximum(np.maximum(primal - high, low - dual), primal - dual) - steps
    sharp = high - low <= 0.5 * (dual - primal + steps)
    batch.record("game: primal <= value <= dual", beyond, size, finite(primal, dual), sharp)
