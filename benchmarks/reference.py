"""The slow reference of `honesty.py`: regularised problems in extended precision, every number with its own bound.

NumPy's `longdouble`, from the mathematics alone: nothing of the library is imported. Nothing is believed because an
iteration stopped. With `h = alpha - 1`, `gap = beta (max q - q)` and log-ratios `L = log(p/p0)`,

    <p, q> - D[p0 : p]/beta  <=  Omega*(q)  <=  psi + (1/beta) sum_a p0_a (e^(alpha L_a) - 1)/alpha

for *any* policy p on the left and *any* psi on the right, with the ratios `L` that psi gives; likewise

    U + g/(1-g) min(T U - U, 0)  <=  V*  <=  U + g/(1-g) max(T U - U, 0)  (around T U)    for any U.

So a reference that went wrong has wide bounds and knows it: its lane counts as not checked. Values are carried as
`h + c` with a constant c, for which the exit rate `(1-g) + g termination` stands, so that a discount near 1 costs no
digits. Where `longdouble` is no wider than a double (some machines), bounds in float64 are rarely sharp enough and the
table says so.
"""

from dataclasses import dataclass

import numpy as np

LD = np.longdouble
UNIT = float(np.finfo(LD).eps)


@dataclass(frozen=True)
class Problem:
    """A batch of problems as they are: numbers that the working precision holds exactly, here in extended precision.

    Attributes:
        P: `[B, S, A, S]`, rows sum to `1 - termination`.
        reward, prior: `[B, S, A]`; prior normalised, reward 0 where the prior is.
        termination: `[B, S, A]`.
        discount, alpha, beta: `[B]`.
        initial: `[B, S]`.
    """

    P: np.ndarray
    reward: np.ndarray
    termination: np.ndarray
    discount: np.ndarray
    alpha: np.ndarray
    beta: np.ndarray
    prior: np.ndarray
    initial: np.ndarray

    @property
    def leave(self) -> np.ndarray:
        """Exit rate `(1-g) + g termination`, `[B, S, A]`."""
        g = self.discount[:, None, None]
        return (1 - g) + g * self.termination

    @property
    def horizon(self) -> np.ndarray:
        """`1/(1-g)`, `[B]`, in double precision."""
        return (1 / (1 - self.discount)).astype(float)


@dataclass(frozen=True)
class Answer:
    """What the reference says of V*: `lower <= V* <= upper`, `[B, S]`; infinite or NaN where it knows nothing."""

    lower: np.ndarray
    upper: np.ndarray


# ---------------------------------------------------------------------------------------------------------------
# one decision


def log_alpha(h: np.ndarray, ratio: np.ndarray) -> np.ndarray:
    """`(e^(h L) - 1)/h` for a log-ratio L, which is L where h = 0."""
    safe = np.where(h == 0, 1, h)
    with np.errstate(all="ignore"):
        return np.where(h == 0, ratio, np.expm1(safe * ratio) / safe)


def ratios(level: np.ndarray, gap: np.ndarray, h: np.ndarray) -> np.ndarray:
    """`log(p/p0)` of every action, given that of the best one; minus infinity off the support."""
    safe = np.where(h == 0, 1, h)
    with np.errstate(all="ignore"):
        inside = np.where(gap == 0, 0, -safe * gap * np.exp(-safe * level))
        return np.where(h == 0, level - gap, level + np.log1p(np.maximum(inside, -1)) / safe)


def mass(log_prior: np.ndarray, ratio: np.ndarray) -> np.ndarray:
    """`p0 e^L`, 0 where either is 0."""
    with np.errstate(all="ignore"):
        return np.where(np.isneginf(log_prior), 0, np.exp(log_prior + np.where(np.isnan(ratio), -np.inf, ratio)))


def divergence(alpha: np.ndarray, prior: np.ndarray, policy: np.ndarray, ratio: np.ndarray | None = None) -> np.ndarray:
    """`D_alpha[p0 : p]`, `[...]`, from `alpha [...]` and distributions `[..., A]`; infinite where it is.

    The sum of `p0 f(p/p0)` with `f >= 0` and `f(1) = f'(1) = 0`, so that arguments which sum to 1 only to rounding cost
    nothing. Of two forms of f the one whose power is bounded at p = 0 is taken; neither cancels at alpha = 0 or 1.
    """
    if ratio is None:
        with np.errstate(all="ignore"):
            ratio = np.where(prior > 0, np.log(policy) - np.log(np.where(prior > 0, prior, 1)), 0)
    order = alpha[..., None]
    forward, mirror = np.where(order >= 0.5, order, 1), np.where(order >= 0.5, 0, order)
    with np.errstate(all="ignore"):
        moved = np.expm1(ratio)
        one = (np.where(policy > 0, (1 + moved) * log_alpha(forward - 1, ratio), 0) - moved) / forward
        two = (log_alpha(mirror, ratio) - moved) / (mirror - 1)
        out = np.where(prior > 0, prior * np.where(order >= 0.5, one, two), 0).sum(-1)
    return np.where(((policy > 0) & (prior == 0)).any(-1), np.inf, out)


def bracket(gap: np.ndarray, log_prior: np.ndarray, h: np.ndarray, fine: bool) -> tuple[np.ndarray, np.ndarray]:
    """Levels `[..., 1]` around the one whose policy sums to one: bisection in double, then in extended precision."""
    best = np.where(gap == 0, log_prior, -np.inf).max(-1, keepdims=True)
    low, high = np.zeros(best.shape), -best.astype(float)
    low, high = _bisect(low, high, gap.astype(float), log_prior.astype(float), h.astype(float), 54)
    if fine:
        reach = 256 * float(np.finfo(float).eps) * (1 + high)
        wide = np.maximum(low - reach, 0).astype(LD), np.minimum(high + reach, -best)
        low, high = _bisect(*wide, gap, log_prior, h, 18)
    return low, high


def _bisect(
    low: np.ndarray, high: np.ndarray, gap: np.ndarray, log_prior: np.ndarray, h: np.ndarray, times: int
) -> tuple[np.ndarray, np.ndarray]:
    for _ in range(times):
        middle = (low + high) / 2
        small = mass(log_prior, ratios(middle, gap, h)).sum(-1, keepdims=True) < 1
        low, high = np.where(small, middle, low), np.where(small, high, middle)
    return low, high


def one_step(
    q: np.ndarray, alpha: np.ndarray, beta: np.ndarray, prior: np.ndarray, fine: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bounds on the normalised conjugate, `[...]` each, and the policy of the lower one, `[..., A]`.

    Args:
        q, prior: `[..., A]`; alpha, beta: `[...]`. Masked entries of q are not read.
        fine: extended precision for the root as well; without it the bounds are as valid and wider.

    Returns:
        lower, upper (their own rounding taken into account), policy.
    """
    live = prior > 0
    with np.errstate(divide="ignore"):
        log_prior = np.log(prior)
    best = np.where(live, q, -np.inf).max(-1, keepdims=True)
    gap = np.where(live, beta[..., None] * (best - np.where(live, q, best)), 0)
    h = alpha[..., None] - 1
    # Actions with a gap of 0 all share the best ratio: together they bound the level from above.
    low, high = bracket(np.where(live, gap, np.inf), log_prior, h, fine)
    below, above = (ratios(x, gap, h) for x in (low, high))
    policy = _mixture(mass(log_prior, below), mass(log_prior, above))
    cost = divergence(alpha, prior, policy)
    primal = best[..., 0] - ((policy * gap).sum(-1) + cost) / beta
    dual, size = np.full_like(primal, np.inf), np.zeros_like(primal)
    for level, ratio in ((low, below), (high, above)):
        excess = np.where(live, prior * log_power(alpha[..., None], ratio), 0)
        fall = log_alpha(h, level)[..., 0]
        dual = np.fmin(dual, best[..., 0] - (fall - excess.sum(-1)) / beta)
        size = np.fmax(size, (np.abs(fall) + np.abs(excess).sum(-1)) / beta)
    # Every summand errs by a few units of its size; exponents up to 150 have lost two digits by then.
    power = 16 + np.abs(alpha) * np.where(live, np.abs(log_prior), 0).max(-1)
    reach = np.where(live, gap, 0).max(-1) / beta
    noise = UNIT * power * (np.abs(best[..., 0]) + reach + size + np.where(np.isfinite(cost), cost, 0) / beta)
    return primal - noise, dual + noise, policy


def log_power(alpha: np.ndarray, ratio: np.ndarray) -> np.ndarray:
    """`(e^(alpha L) - 1)/alpha`, which is L where alpha = 0 and -1/alpha off the support (alpha > 1)."""
    safe = np.where(alpha == 0, 1, alpha)
    with np.errstate(all="ignore"):
        return np.where(alpha == 0, ratio, np.expm1(safe * ratio) / safe)


def _mixture(below: np.ndarray, above: np.ndarray) -> np.ndarray:
    """The mixture of two sides of a bracket that sums to one: for alpha > 2 neighbours can differ visibly."""
    low, high = below.sum(-1, keepdims=True), above.sum(-1, keepdims=True)
    wide = high > low
    share = np.clip(np.where(wide, (1 - low) / np.where(wide, high - low, 1), 0), 0, 1)
    policy = below + share * (above - below)
    return policy / policy.sum(-1, keepdims=True)


def conjugate(x: np.ndarray, alpha: np.ndarray, beta: np.ndarray, prior: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bounds on `Omega*(x)` for `x [..., A]`, `[...]` each."""
    return one_step(x.astype(LD), alpha, beta, prior)[:2]


# ---------------------------------------------------------------------------------------------------------------
# chains and fixed points


def under(problem: Problem, policy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`g P_pi`, `[B, S, S]`, and the policy's exit rate, `[B, S]`."""
    chain = np.einsum("bsa,bsat->bst", policy, problem.P)
    return problem.discount[:, None, None] * chain, (policy * problem.leave).sum(-1)


def inverse(K: np.ndarray) -> np.ndarray:
    """`(I - K)^-1` in double precision, the start of every solve here."""
    return np.linalg.inv(np.eye(K.shape[-1]) - K.astype(float))


def evaluate(problem: Problem, policy: np.ndarray, running: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Value of a fixed policy with a running reward `[B, S]` (its cost taken off), `[B, S]`, and a bound on its error.

    The residual in extended precision, divided by `1 - g`, bounds the error, whatever the linear solver did.
    """
    K, leave = under(problem, policy)
    approximate = inverse(K)
    h, c = np.zeros_like(running), np.zeros(len(running), LD)
    error = np.full(len(running), np.inf)
    with np.errstate(all="ignore"):
        for _ in range(6):
            move = np.einsum("bst,bt->bs", approximate, _residual(K, leave, running, h, c).astype(float))
            h, c = _centred(h + move, c)
        residual = np.abs(_residual(K, leave, running, h, c)).max(-1)
        size = np.abs(h).max(-1) * (8 + K.shape[-1]) + 4 * np.abs(running).max(-1)
        error = (residual + UNIT * size) / (1 - problem.discount) + 8 * UNIT * np.abs(c)
    return h + c[:, None], error


def _residual(K: np.ndarray, leave: np.ndarray, running: np.ndarray, h: np.ndarray, c: np.ndarray) -> np.ndarray:
    return (running - c[:, None] * leave) + np.einsum("bst,bt->bs", K, h) - h


def _centred(h: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    middle = (h.max(-1) + h.min(-1)) / 2
    return h - middle[:, None], c + middle


def visits(problem: Problem, policy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Discounted visits of states, `[B, S]`, and a bound on their error in the 1-norm, `[B]`."""
    K = under(problem, policy)[0]
    approximate, d = inverse(K), np.zeros_like(problem.initial)

    def residual() -> np.ndarray:
        return problem.initial + np.einsum("bst,bs->bt", K, d) - d

    with np.errstate(all="ignore"):
        for _ in range(6):
            d = d + np.einsum("bst,bs->bt", approximate, residual().astype(float))
        rounding = UNIT * (8 + K.shape[-1]) * np.abs(d).sum(-1)
        return d, (np.abs(residual()).sum(-1) + rounding) / (1 - problem.discount)


def solve(problem: Problem, turns: int = 100) -> Answer:
    """Bounds on V*: policy iteration in double precision, a few turns in extended precision, then one proof."""
    alpha, beta = (np.broadcast_to(x[:, None], problem.reward.shape[:2]) for x in (problem.alpha, problem.beta))
    h, c = np.zeros(alpha.shape, LD), np.zeros(len(alpha), LD)
    best, stale = np.full(len(alpha), np.inf), np.zeros(len(alpha), int)
    lower, upper = np.full(alpha.shape, -np.inf, LD), np.full(alpha.shape, np.inf, LD)

    def turn(fine: bool, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """One backup of some lanes: its bounds and its policy."""
        g = problem.discount[rows, None, None]
        ahead = np.einsum("bsat,bt->bsa", problem.P[rows].astype(LD if fine else float), h[rows])
        q = problem.reward[rows] - c[rows, None, None] * problem.leave[rows] + g * ahead
        return one_step(q, alpha[rows], beta[rows], problem.prior[rows], fine)

    with np.errstate(all="ignore"):
        rows = np.arange(len(alpha))
        for _ in range(turns):
            low, high, policy = turn(False, rows)
            residual = np.where(alpha[rows] > 1, low, high) - h[rows]
            error = np.abs(residual).max(-1).astype(float)
            stale[rows] = np.where(error < 0.5 * best[rows], 0, stale[rows] + 1)
            best[rows] = np.fmin(best[rows], error)
            _improve(problem, h, c, rows, policy, residual)
            rows = rows[(stale[rows] < 6) & (best[rows] > 0) & np.isfinite(error)]
            if not len(rows):
                break
        rows = np.arange(len(alpha))
        for _ in range(4):
            low, high, policy = turn(True, rows)
            found = _proof(problem, h, c, low, high)
            tighter = _width(*found) < _width(lower, upper)
            lower, upper = (np.where(tighter, new, old) for new, old in zip(found, (lower, upper)))
            _improve(problem, h, c, rows, policy, np.where(alpha > 1, low, high) - h)
    return Answer(lower, upper)


def _improve(
    problem: Problem, h: np.ndarray, c: np.ndarray, rows: np.ndarray, policy: np.ndarray, residual: np.ndarray
):
    """One step of policy iteration in correction form, in place."""
    part = Problem(*(getattr(problem, name)[rows] for name in Problem.__dataclass_fields__))
    matrix = np.eye(h.shape[-1]) - under(part, policy)[0].astype(float)
    sound = np.isfinite(matrix).all((1, 2)) & np.isfinite(residual).all(-1)
    move = np.zeros(residual.shape)
    move[sound] = np.linalg.solve(matrix[sound], residual[sound].astype(float)[..., None])[..., 0]
    h[rows], c[rows] = _centred(h[rows] + move, c[rows])


def _width(lower: np.ndarray, upper: np.ndarray) -> np.ndarray:
    """Largest width per lane, `[B, 1]`; infinite where there is none."""
    width = (upper - lower).max(-1, keepdims=True)
    return np.where(np.isfinite(width), width, np.inf)


def _proof(
    problem: Problem, h: np.ndarray, c: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Bounds on V* from bounds on one backup at `h + c`, rounding included."""
    g = problem.discount
    down = np.minimum((low - h).min(-1), 0)
    up = np.maximum((high - h).max(-1), 0)
    size = (problem.P.shape[-1] + 8) * np.abs(h).max(-1) + 4 * np.abs(problem.reward).max((1, 2))
    noise = UNIT * size / (1 - g) + 8 * UNIT * np.abs(c)
    return (
        low + (c + g / (1 - g) * down - noise)[:, None],
        high + (c + g / (1 - g) * up + noise)[:, None],
    )
