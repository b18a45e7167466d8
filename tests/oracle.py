"""A slow, obvious reference in NumPy float64, written from the mathematics and not from the library.

One-step problems are solved by bisection; fixed points by policy iteration with dense solves. Nothing here is
fast, and nothing here imports ``robustreg``.

Parametrisation of the normaliser. With ``h = alpha - 1`` and ``gap_a = beta (max q - q_a)`` the policy is
``prior_a exp_alpha(t - gap_a)`` for the ``t = beta (max q - psi)`` that makes it sum to one. Writing
``t = log_alpha(e^u)`` turns the unknown into ``u``, the log ratio ``log(pi / prior)`` of the best action: it lies in
``[0, log 1/prior]`` for every alpha, and the log ratio of action a is ``u + log1p(-h gap_a e^(-h u)) / h``, which tends
to ``u - gap_a`` as h tends to 0. Nothing overflows for priors down to 1e-12 and alpha in [-10, 10].
"""

from decimal import Decimal, localcontext
from typing import Any

import numpy as np

# ---------------------------------------------------------------------------------------------------------------
# divergences


def real(x):
    """As float64, or as extended precision where it already is."""
    x = np.asarray(x)
    return x if x.dtype == np.longdouble else x.astype(float)


def deformed_log(h, ratio_log):
    """log_alpha(u) = (u^h - 1) / h, given log u and h = alpha - 1."""
    h = real(h)
    safe = np.where(h == 0, 1.0, h)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.where(h == 0, ratio_log, np.expm1(safe * ratio_log) / safe)


def _log_ratio(prior, policy):
    """log(policy / prior): -inf where only the policy is zero, 0 where the prior is zero (masked)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(prior > 0, np.log(policy) - np.log(np.where(prior > 0, prior, 1.0)), 0.0)


def divergence(alpha, prior, policy, log_ratio=None):
    """D_alpha[prior : policy] over the last axis; normalised arguments, any real alpha, zeros allowed.

    alpha has the shape of the result. For alpha >= 1/2 it is ``sum pi log_alpha(pi / prior) / alpha``, else by
    skew symmetry the mirror image: in both forms the power that is subtracted from one stays small at 0 and 1.
    """
    prior, policy = np.broadcast_arrays(real(prior), real(policy))
    alpha = real(alpha)[..., None] * np.ones(policy.shape)
    ratio = _log_ratio(prior, policy) if log_ratio is None else log_ratio
    upper = np.where(alpha >= 0.5, alpha, 1.0)
    lower = np.where(alpha >= 0.5, 0.0, alpha)
    with np.errstate(invalid="ignore", over="ignore"):
        forward = np.where(policy > 0, policy * deformed_log(upper - 1, ratio), 0.0) / upper
        mirror = np.where(prior > 0, prior * deformed_log(lower, ratio), 0.0) / (lower - 1)
    return np.where(alpha >= 0.5, forward, mirror).sum(-1)


# ---------------------------------------------------------------------------------------------------------------
# one state: conjugate, policy, worst case


def best_response(alpha, beta, prior, q):
    """max over policies of <pi, q> - D_alpha[prior : pi] / beta, and the policy that attains it.

    Args:
      alpha, beta: [...]; prior, q: [..., A]; all broadcast against each other.
        q may hold anything (NaN, -inf) where the prior is 0.

    Returns:
      value [...], policy [..., A].
    """
    alpha, beta = (real(x)[..., None] for x in (alpha, beta))
    alpha, beta, prior, q = np.broadcast_arrays(alpha, beta, real(prior), real(q))
    alpha, beta = alpha[..., :1], beta[..., :1]
    live = prior > 0
    # A stored prior misses 1 by rounding, which a small beta would magnify.
    prior = prior.astype(np.result_type(prior, q))
    prior = prior / prior.sum(-1, keepdims=True)
    h = alpha - 1
    q = np.where(live, q, -np.inf)
    top = q.max(-1, keepdims=True)
    gap = np.where(live, beta * (top - np.where(live, q, top)), np.inf)

    def ratios(u):
        """log(pi / prior) of every action, given that of the best one."""
        safe = np.where(h == 0, 1.0, h)
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            inside = np.where(live & (gap > 0), -safe * gap * np.exp(-safe * u), 0.0)
            curved = u + np.log1p(np.maximum(inside, -1.0)) / safe
        return np.where(live, np.where(h == 0, u - gap, curved), -np.inf)

    best = np.where(gap == 0, prior, 0.0).max(-1, keepdims=True)
    low, high = np.zeros_like(best), -np.log(best)
    for _ in range(75):
        middle = 0.5 * (low + high)
        small = (prior * np.exp(ratios(middle))).sum(-1, keepdims=True) < 1
        low, high = np.where(small, middle, low), np.where(small, high, middle)

    # The two ends are neighbouring floats, yet for alpha > 2 their policies can differ visibly (a vertical tangent
    # where an action enters the support): take the mixture that sums to one.
    below, above = prior * np.exp(ratios(low)), prior * np.exp(ratios(high))
    total = below.sum(-1, keepdims=True), above.sum(-1, keepdims=True)
    wide = total[1] > total[0]
    share = np.where(wide, (1 - total[0]) / np.where(wide, total[1] - total[0], 1.0), 0.0)
    policy = below + np.clip(share, 0, 1) * (above - below)
    policy = policy / policy.sum(-1, keepdims=True)

    # The value, from whichever side is stationary at the root. alpha <= 1: any psi gives the upper bound
    # psi + (1/beta) sum prior (ratio^alpha - 1)/alpha. alpha > 1, where the best response may be a vertex of
    # enormous cost: any policy gives the lower bound <pi, q> - D/beta.
    psi = top[..., 0] - deformed_log(h[..., 0], high[..., 0]) / beta[..., 0]
    power = np.where(alpha == 0, 1.0, np.minimum(alpha, 1.0))
    log_ratio = ratios(high)
    excess = np.where(alpha == 0, log_ratio, np.expm1(power * log_ratio) / power)
    dual = psi + (prior * np.where(live, excess, 0.0)).sum(-1) / beta[..., 0]
    cost = divergence(np.maximum(alpha[..., 0], 1.0), prior, policy)
    primal = (policy * np.where(live, q, 0.0)).sum(-1) - cost / beta[..., 0]
    return np.where(alpha[..., 0] > 1, primal, dual), policy


def conjugate(alpha, beta, prior, q):
    """Normalised conjugate (1/beta) Omega*(q) over the last axis."""
    return best_response(alpha, beta, prior, q)[0]


def exact_conjugate(alpha, beta, prior, q, digits=60):
    """The same number for one state in decimal arithmetic: the oracle's own oracle.

    Textbook formulas throughout; with this many digits there is nothing to be careful about.
    """
    with localcontext() as context:
        context.prec = digits
        context.Emin, context.Emax = -(10**9), 10**9
        pairs = [(Decimal(float(p)), Decimal(float(x))) for p, x in zip(prior, q, strict=True) if p > 0]
        total = sum(p for p, _ in pairs)
        pairs = [(p / total, x) for p, x in pairs]
        a, b = Decimal(float(alpha)), Decimal(float(beta))
        h, top = a - 1, max(x for _, x in pairs)

        def ratio(u, x):
            if h == 0:
                return (u - b * (top - x)).exp()
            inside = (h * u).exp() - h * b * (top - x)
            return (inside.ln() / h).exp() if inside > 0 else Decimal(0)

        low, high = Decimal(0), -max(p for p, x in pairs if x == top).ln()
        for _ in range(int(3.4 * digits)):
            middle = (low + high) / 2
            if sum(p * ratio(middle, x) for p, x in pairs) < 1:
                low = middle
            else:
                high = middle
        below, above = ([p * ratio(u, x) for p, x in pairs] for u in (low, high))
        wide = sum(above) - sum(below)
        share = (1 - sum(below, Decimal(0))) / wide if wide else Decimal(0)
        mixed = [lo + share * (hi - lo) for lo, hi in zip(below, above, strict=True)]
        policy = [(p, pi / sum(mixed), x) for (p, x), pi in zip(pairs, mixed, strict=True)]
        mean = sum(pi * x for _, pi, x in policy)
        if a == 1:
            cost = sum((pi * (pi / p).ln() for p, pi, _ in policy if pi > 0), Decimal(0))
        elif a == 0:
            cost = sum((p * (p / pi).ln() for p, pi, _ in policy), Decimal(0))
        else:
            mixed = sum(((1 - a) * p.ln() + a * pi.ln()).exp() for p, pi, _ in policy if pi > 0)
            cost = (1 - mixed) / (a * (1 - a))
        return mean - cost / b


def project_simplex(weights):
    """Euclidean projection of each row onto the probability simplex, by sorting."""
    rows = np.atleast_2d(weights)
    out = np.empty_like(rows)
    for i, row in enumerate(rows):
        descending = np.sort(row)[::-1]
        thresholds = (np.cumsum(descending) - 1) / np.arange(1, row.size + 1)
        active = np.nonzero(descending > thresholds)[0][-1]
        out[i] = np.maximum(row - thresholds[active], 0)
    return out.reshape(np.shape(weights))


def worst_case(alpha, beta, prior, policy):
    """Delta_r of any policy: log_alpha(pi / prior) / beta + (1 - alpha) D / beta; 0 on masked actions."""
    alpha, beta = np.asarray(alpha, float), np.asarray(beta, float)
    prior, policy = np.broadcast_arrays(np.asarray(prior, float), np.asarray(policy, float))
    tilt = deformed_log(alpha[..., None] - 1, _log_ratio(prior, policy))
    shift = np.where(alpha == 1, 0.0, (1 - alpha) * divergence(alpha, prior, policy))[..., None]
    return np.where(prior > 0, (tilt + shift) / beta[..., None], 0.0)


# ---------------------------------------------------------------------------------------------------------------
# Markov chains and decision processes: P [S, A, S] (rows may sum to less than one: the episode ends), reward [S, A]


def chain_of(P, policy):
    """Transition matrix under a policy, [*B, S, S]."""
    return np.einsum("...sa,...sat->...st", policy, P)


def dense_solve(chain, discount, rhs, transpose=False):
    """(I - discount chain)^-1 rhs for every problem of a batch; rhs [*B, S]."""
    system = np.eye(chain.shape[-1]) - np.asarray(discount)[..., None, None] * chain
    system = np.swapaxes(system, -1, -2) if transpose else system
    return np.linalg.solve(system, rhs[..., None])[..., 0]


def evaluate(P, reward, discount, policy, cost: Any = 0.0):
    """Value of a fixed policy [*B, S], with an optional running cost per state."""
    running = (policy * np.where(policy > 0, reward, 0.0)).sum(-1) - cost
    return dense_solve(chain_of(P, policy), discount, running)


def occupancy(P, initial, discount, policy):
    """Unnormalised discounted occupancy [*B, S, A]: expected discounted number of visits."""
    return dense_solve(chain_of(P, policy), discount, initial, transpose=True)[..., None] * policy


def solve(P, reward, discount, alpha, beta, prior):
    """Fixed point V = conjugate(reward + discount P V), and its policy, by policy iteration in correction form.

    The value is carried as ``h + c`` with a constant c taken out, so that a large common part (discount near 1)
    costs no digits: ``T(h + c) - (h + c)`` is formed as ``conjugate(r + g P h - drift c) - h`` with
    ``drift = (1 - g) + g * ended``, ``ended`` the missing mass of each row.

    Args:
      P: [*B,S,A,S]; reward, prior: [*B,S,A]; discount, alpha: [*B]; beta: [*B] or, per state, [*B,S].

    Returns:
      value [*B,S], policy [*B,S,A].
    """
    discount, alpha, beta = (np.asarray(x, float) for x in (discount, alpha, beta))
    beta = beta if beta.ndim > discount.ndim else beta[..., None]
    batch = np.broadcast_shapes(
        P.shape[:-3], reward.shape[:-2], prior.shape[:-2], discount.shape, alpha.shape, beta.shape[:-1]
    )
    states, actions = reward.shape[-2:]
    prior = np.broadcast_to(prior, batch + (states, actions))
    reward = np.where(prior > 0, reward, 0.0)
    alpha, beta = alpha[..., None], np.broadcast_to(beta, batch + (states,))
    g = discount[..., None, None].astype(np.longdouble)
    drift = (1 - g) + g * (1 - P.sum(-1))
    h, c = np.zeros(batch + (states,)), np.zeros(batch)
    size, stale = np.full(batch, np.inf), np.zeros(batch, int)
    best_h, best_c = h, c
    for _ in range(100):
        q = reward + g * np.einsum("...sat,...t->...sa", P, h) - drift * c[..., None, None]
        backup, policy = best_response(alpha, beta, prior, q.astype(float))
        residual = backup - h
        error = np.abs(residual).max(-1)
        better = error < size
        stale = np.where(error < 0.5 * size, 0, stale + 1)
        best_h, best_c = np.where(better[..., None], h, best_h), np.where(better, c, best_c)
        size = np.minimum(size, error)
        if (stale > 2).all():
            break
        h = h + dense_solve(chain_of(P, policy), discount, residual)
        middle = 0.5 * (h.max(-1) + h.min(-1))
        h, c = h - middle[..., None], c + middle
    assert (size < 1e-13 * (1 + np.abs(reward).max() + np.abs(h).max(-1) + (1 / beta).max(-1))).all(), size.max()
    # Rounding of the residual comes back multiplied by 1 / (1 - discount): two corrections with the residual in
    # extended precision leave an answer good to the last bits of a double (where the machine has such a format).
    h, c, wide = best_h.astype(np.longdouble), best_c.astype(np.longdouble), reward.astype(np.longdouble)
    for _ in range(2):
        ahead = np.einsum("...sat,...t->...sa", P.astype(np.longdouble), h)
        backup, policy = best_response(alpha, beta, prior, wide + g * ahead - drift * c[..., None, None])
        policy = policy.astype(float)
        h = h + dense_solve(chain_of(P, policy), discount, (backup - h).astype(float))
    return (h + c[..., None]).astype(float), policy


def optimal_value(P, reward, discount, allowed=None):
    """Plain, unregularised optimum by policy iteration; ``allowed`` [S, A] restricts the actions."""
    allowed = np.ones(reward.shape, bool) if allowed is None else allowed
    reward = np.where(allowed, reward, 0.0)
    choice = np.argmax(np.where(allowed, reward, -np.inf), -1)
    for _ in range(1000):
        policy = np.eye(reward.shape[1])[choice]
        value = evaluate(P, reward, discount, policy)
        q = np.where(allowed, reward + discount * (P @ value), -np.inf)
        now = np.take_along_axis(q, choice[:, None], -1)[:, 0]
        better = q.max(-1) > now + 1e-12 * (1 + np.abs(now))
        if not better.any():
            return value
        choice = np.where(better, q.argmax(-1), choice)
    raise AssertionError("policy iteration cycles")


def value_iteration(P, reward, discount, sweeps, allowed=None):
    """Plain value iteration from zero: nothing but maximum, sum and product."""
    value = np.zeros(len(reward))
    for _ in range(sweeps):
        q = reward + discount * (P @ value)
        value = (q if allowed is None else np.where(allowed, q, -np.inf)).max(-1)
    return value


def gradients(P, reward, discount, alpha, beta, prior, initial):
    """Gradients of ``<initial, V*>`` in every leaf, from closed forms (no automatic differentiation), one problem.

    ``d`` are the discounted visits, ``mu = d pi``, L = log(pi / prior): dJ/dr = mu, dJ/dP = g mu V, dJ/dg = sum mu P V,
    dJ/dbeta = sum d D / beta^2, dJ/dalpha = -sum d (dD/dalpha) / beta by a difference of D at fixed pi, and
    dJ/dprior = d / beta times (e^(alpha L) - 1)/alpha, the last along directions that keep the prior normalised.
    """
    value, policy = solve(P, reward, discount, alpha, beta, prior)
    mu = occupancy(P, initial, discount, policy)
    visits = mu.sum(-1)
    cost = divergence(np.full(visits.shape, alpha), prior, policy)
    step = 1e-4
    ahead, behind, far, near = (
        divergence(np.full(visits.shape, alpha + k * step), prior, policy) for k in (1, -1, 2, -2)
    )
    slope = (8 * (ahead - behind) - (far - near)) / (12 * step)
    ratio = _log_ratio(prior, policy)
    moved = np.where(prior > 0, deformed_log(np.full(ratio.shape, float(alpha)), ratio), 0.0)
    return {
        "reward": mu,
        "P": discount * mu[..., None] * value,
        "discount": (mu * (P @ value)).sum(),
        "initial": value,
        "beta": (visits * cost).sum() / beta**2,
        "alpha": -(visits * slope).sum() / beta,
        "prior": visits[:, None] * moved / beta,
    }
