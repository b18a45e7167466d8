"""The numbers behind the figures of the paper, one function per figure, apart from how they are drawn.

The source is [Brekelmans et al. 2022, "Your Policy Regularizer is Secretly an Adversary"]. Every function takes the
parameters of one figure, plain numbers and lists, solves what there is to solve, and returns named NumPy arrays that
hold all that the picture shows (`paper_figures` draws from nothing else), so that a file of them *is* the figure.
What the arrays have to satisfy is the theory that the figure illustrates:

    decision        Q - dr = V for every action: the agent is indifferent
    feasible_sets   the worst case lies on the boundary of the robust set, with the policy as outward normal
    sequential      the same in every state of an MDP, with Q = r + g P V
    consistency     r - dr + g P V = V for every (s, a), hence summed along any trajectory whatever its actions
    price           guaranteed <= nominal <= optimum, and the price optimum - nominal falls as beta grows
    attacks         outside the robust set the guarantee fails, and the inequality of Fenchel and Young still holds

Perturbations are `dr` with `r' = r - dr`; values, rewards and perturbations are in reward units, beta is in 1/reward
units; alpha = 1 is KL. A prior of None is uniform.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from robustreg._core import checks
from robustreg.adversary.attacks import norm_attack, random_attack
from robustreg.adversary.guarantees import guarantee
from robustreg.adversary.perturbations import slack, worst_case
from robustreg.adversary.robust_sets import RobustSet
from robustreg.problems.mdps import MDP
from robustreg.problems.problem import Problem
from robustreg.regularisers import families
from robustreg.regularisers.regulariser import Regulariser
from robustreg.solvers.evaluation import nominal_optimum
from robustreg.solvers.loop import solve
from robustreg.solvers.solution import SolveError, Status
from robustreg.sweeps.runner import sweep

Numbers = dict[str, np.ndarray]


def decision(
    reward: Sequence[float], beta: Sequence[float], alpha: float = 1.0, prior: Sequence[float] | None = None
) -> Numbers:
    """One decision under several strengths.

    Args:
        reward: of each action, `[A]`.
        beta: inverse strengths, `[K]`, one row of the picture each.
        alpha: of the divergence.
        prior: reference policy, `[A]`.

    Returns:
        `reward [A]`, `beta [K]`, `alpha`, `value [K]`, and `policy`, `perturbation`, `perturbed` (what is left of the
        reward) `[K, A]`.
    """
    reg = _regulariser(alpha, _axis("beta", beta), prior)
    r = jnp.asarray(_axis("reward", reward), reg.beta.dtype)
    value = reg.conjugate(r)
    perturbation = r[None] - value[:, None]
    return _arrays(
        reward=r,
        beta=reg.beta,
        alpha=alpha,
        value=value,
        policy=reg.argmax(r),
        perturbation=perturbation,
        perturbed=r[None] - perturbation,
    )


def feasible_sets(
    reward: Sequence[float],
    beta: Sequence[float],
    alpha: Sequence[float],
    prior: Sequence[float] | None = None,
    window: float = 1.5,
    points: int = 400,
) -> Numbers:
    """Robust sets of one decision between two actions, seen as sets of perturbed rewards.

    Args:
        reward: of the two actions.
        beta: inverse strengths, `[K]`, one row of the picture each.
        alpha: of the divergences, `[M]`, one column each.
        prior: reference policy, of two actions.
        window: half the width of what is shown around the reward, in reward units.
        points: on each boundary.

    Returns:
        `reward [2]`, `window`, `beta [K]`, `alpha [M]`, `prior [2]`; `boundary [M, K, points, 2]`, perturbed rewards;
        of the worst case: `worst` (the reward that it leaves) and `policy` and `normal` (gradient of the conjugate
        at the perturbation) `[M, K, 2]`, `value` and `slack` `[M, K]`.
    """
    points = checks.count("points", points)
    checks.require("window", window, lambda x: (x > 0) & np.isfinite(x), "half the width of the picture is positive")
    reg = families.alpha(_axis("alpha", alpha)[:, None], _axis("beta", beta), _prior(prior))
    r = jnp.asarray(_axis("reward", reward), reg.beta.dtype)
    if r.size != 2:
        raise ValueError(f"reward is {reward!r}; expected the rewards of two actions")
    value = reg.conjugate(r)
    dr = r[None, None] - value[..., None]
    return _arrays(
        reward=r,
        window=window,
        beta=reg.beta,
        alpha=reg.alpha[:, 0],
        prior=[0.5, 0.5] if prior is None else prior,
        boundary=_boundary(reg, r, window, points),
        worst=r[None, None] - dr,
        policy=reg.argmax(r),
        normal=jax.grad(lambda x: -jnp.sum(slack(reg, x)))(dr),
        value=value,
        slack=slack(reg, dr),
    )


def _boundary(reg: Regulariser, reward: jax.Array, window: float, points: int) -> np.ndarray:
    """Perturbed rewards on the boundary of sets `[M, K]`, so that few points make a smooth picture.

    Args:
        reg: with batch axes `[M, K]`.
        reward: `[2]`.
        window: half the width of what is shown.
        points: on each boundary, evenly along what is shown of it, from one vertex of the simplex to the other.

    Returns:
        `[M, K, points, 2]`.
    """
    # Evenly in log-odds, the far ends of the boundary are there, but nearly all points lie outside the picture.
    odds = np.linspace(-1, 1, 4001) * -np.log(np.finfo(reward.dtype).eps)

    def edge(odds: np.ndarray) -> np.ndarray:
        share = jnp.asarray(1 / (1 + np.exp(-odds)), reward.dtype)
        points = jnp.broadcast_to(share, reg.batch_shape + share.shape[-1:])
        return np.asarray(reward) - np.asarray(RobustSet(reg).boundary(points))

    centre = np.asarray(reward)
    seen = np.clip(np.nan_to_num(edge(odds), nan=0.0), centre - 1.2 * window, centre + 1.2 * window)
    length = np.cumsum(np.linalg.norm(np.diff(seen, axis=-2), axis=-1), axis=-1)
    length = np.concatenate([np.zeros_like(length[..., :1]), length], axis=-1)
    chosen = np.empty((*reg.batch_shape, points))
    for at in np.ndindex(*reg.batch_shape):
        chosen[at] = np.interp(np.linspace(0, length[at][-1], points), length[at], odds)
    return edge(chosen)


def sequential(problem: Problem, beta: Sequence[float], alpha: float = 1.0) -> Numbers:
    """Solve a grid world under several strengths.

    Args:
        problem: whose states are cells of a grid.
        beta: inverse strengths, `[K]`, one row of the picture each.
        alpha: of the divergence.

    Returns:
        `beta [K]`, `alpha`, `objective [K]`, `value [K, S]`, `policy`, `q` and `perturbation` `[K, S, A]`, and the
        drawing: `grid` (rows, columns), `marks [S]` (names of remarkable cells), `actions [A]` (names).
    """
    m = problem.mdp
    reg = _regulariser(alpha, _axis("beta", beta))
    sol = solve(m, reg).raise_if_failed()
    return _arrays(
        beta=reg.beta,
        alpha=alpha,
        objective=sol.objective,
        value=sol.value,
        policy=sol.policy,
        q=sol.q,
        perturbation=sol.perturbation,
        **_drawing(problem),
    )


def consistency(
    problem: Problem, beta: float, alpha: float = 1.0, trajectories: int = 6, steps: int = 30, seed: int = 0
) -> Numbers:
    """Indifference in every state, and path consistency along trajectories.

    What was collected up to a step plus the value of where it led, `sum_{k<t} g^k x_k + g^t V(s_t)`, does not depend
    on t for the perturbed reward `x = r - dr`, nor therefore on the actions. Where transitions are random, each step
    also pays the surprise `g (P V)(s, a) - g V(s')`, which has mean 0.

    Args:
        problem: the MDP.
        beta: inverse strength.
        alpha: of the divergence.
        trajectories: N; every second one takes uniformly random actions, the others those of the policy.
        steps: T of each.
        seed: of the trajectories.

    Returns:
        `beta`, `alpha`, `value [S]`, `policy [S, A]`, `perturbed_q [S, A]` (`Q - dr`), `unforced_q [S, A]` (the same
        with the worst case of the policy alone, without the multiplier of `p >= 0`: less on actions never taken),
        `states [N, T+1]`, `taken [N, T]` (actions), and the running totals `perturbed` and `nominal` `[N, T+1]`.
    """
    m = problem.mdp
    reg = _regulariser(alpha, beta)
    sol = solve(m, reg).raise_if_failed()
    value, policy, q, dr = (np.asarray(x) for x in (sol.value, sol.policy, sol.q, sol.perturbation))
    count, steps = checks.count("trajectories", trajectories), checks.count("steps", steps)
    states, taken = _trajectories(m, policy, count, steps, _seed(seed))
    here, there = states[:, :-1], states[:, 1:]
    surprise = q[here, taken] - np.asarray(m.reward)[here, taken] - float(m.discount) * value[there]
    nominal = np.asarray(m.reward)[here, taken] + surprise
    return _arrays(
        beta=reg.beta,
        alpha=alpha,
        value=value,
        policy=policy,
        perturbed_q=q - dr,
        unforced_q=q - np.asarray(worst_case(reg, sol.policy)),
        states=states,
        taken=taken,
        perturbed=_running(nominal - dr[here, taken], value[states], float(m.discount)),
        nominal=_running(nominal, value[states], float(m.discount)),
    )


def price(problem: Problem, beta: Sequence[float], alpha: Sequence[float]) -> Numbers:
    """Compute what robustness costs and buys, against the strength.

    Args:
        problem: the MDP.
        beta: inverse strengths, `[K]`.
        alpha: of the divergences, `[M]`.

    Returns:
        `beta [K]`, `alpha [M]`, `guaranteed` (the objective) and `nominal` (the return undisturbed) `[M, K]`,
        `optimum` (the best return of any policy, undisturbed), `resolution` (a price below it is rounding).
    """
    outputs = ("objective", "nominal_return", "status")
    grid = {"alpha": _axis("alpha", alpha), "beta": _axis("beta", beta)}
    reg = families.alpha(1.0, 1.0)
    table = sweep(problem.mdp, reg, grid, outputs=outputs)
    failed = int((table["status"] != Status.CONVERGED).sum())
    if failed:
        wider = "" if problem.mdp.dtype.itemsize >= 8 else " or float64"
        raise SolveError(f"{failed} of {len(table)} strengths did not converge: take a smaller problem{wider}")
    optimum = nominal_optimum(problem.mdp, reg)
    # Values are rounded to one part in 1/eps of their size, once each step of the horizon.
    size = np.finfo(problem.mdp.dtype).eps * max(1e-300, float(jnp.max(jnp.abs(optimum))))
    return _arrays(
        **grid,
        guaranteed=table["objective"],
        nominal=table["nominal_return"],
        optimum=_start(problem.mdp, optimum),
        resolution=4 * size / float(problem.mdp.complement),
    )


def attacks(
    problem: Problem,
    beta: float,
    scale: Sequence[float],
    alpha: float = 1.0,
    order: float = 2.0,
    samples: int = 32,
    seed: int = 0,
) -> Numbers:
    """Compute what attacks of growing size do to a robust policy, within the robust set and outside.

    Four attacks, each times `scale`: the worst case; one of the same norm in every state that only lowers rewards, the
    worst of them; uniform noise that costs what the worst case costs; and the worst case plus the same amount in every
    action, which takes as much as the scaled one at the least cost there is.

    Args:
        problem: the MDP.
        beta: inverse strength.
        scale: of the attacks, `[n]`; at 1 the worst case is on the boundary.
        alpha: of the divergence.
        order: of the norm.
        samples: N, of the noise.
        seed: of the noise.

    Returns:
        `beta`, `alpha`, `order`, `scale [n]`, `guaranteed`, `undisturbed`; of the attacks "worst", "ball", "shifted"
        `[n]` and "noise" `[n, N]`: `worst_return` and so on, and `worst_cost` and so on, `sum_s d Omega*(dr)` over
        discounted visits d: positive outside the aggregated robust set.
    """
    m = problem.mdp
    reg = _regulariser(alpha, beta)
    sol = solve(m, reg).raise_if_failed()
    worst, cost = sol.perturbation[None], reg.value(sol.policy)[None, :, None]
    size = jnp.asarray(np.linalg.norm(np.asarray(worst), ord=order, axis=-1), m.dtype)
    ball = norm_attack(sol.policy[None], size, order)
    samples = checks.count("samples", samples)
    noise = random_attack(jax.random.key(_seed(seed)), reg, jnp.broadcast_to(sol.policy, (samples, *sol.policy.shape)))
    t = jnp.asarray(_axis("scale", scale), m.dtype)[:, None, None, None]
    shifted = worst[None] + (t - 1) * cost[None]
    # No attack and every kind of attack together, in one batch: [n, 4 + N, S, A].
    dr = jnp.concatenate([t * 0 * worst[None], t * worst[None], t * ball[None], shifted, t * noise[None]], axis=1)
    met = guarantee(m, reg, sol.policy, m.reward[None, None] - dr)
    named = {"worst": 1, "ball": 2, "shifted": 3, "noise": slice(4, None)}
    return _arrays(
        beta=reg.beta,
        alpha=alpha,
        order=order,
        scale=t[:, 0, 0, 0],
        guaranteed=met.guaranteed[0, 0],
        undisturbed=met.actual[0, 0],
        **{f"{name}_return": met.actual[:, which] for name, which in named.items()},
        **{f"{name}_cost": -met.total_slack[:, which] for name, which in named.items()},
    )


def _trajectories(m: MDP, policy: np.ndarray, count: int, steps: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """States `[N, T+1]` and actions `[N, T]`; every second trajectory takes uniformly random actions."""
    rng = np.random.default_rng(seed)
    kernel = np.asarray(m.transitions.expect(jnp.eye(m.n_states, dtype=m.dtype)), float)  # [S', S, A]
    chances = np.stack([policy, np.full_like(policy, 1 / m.n_actions)])[np.arange(count) % 2]
    states, taken = np.empty((count, steps + 1), int), np.empty((count, steps), int)
    states[:, 0] = _draw(rng, np.broadcast_to(np.asarray(m.initial, float), (count, m.n_states)))
    for k in range(steps):
        here = states[:, k]
        taken[:, k] = _draw(rng, chances[np.arange(count), here])
        states[:, k + 1] = _draw(rng, kernel[:, here, taken[:, k]].T)
    return states, taken


def _draw(rng: np.random.Generator, chances: np.ndarray) -> np.ndarray:
    """One index per row of `chances [N, n]`."""
    total = np.cumsum(chances, axis=-1)
    return (rng.random((len(chances), 1)) * total[:, -1:] >= total).sum(-1)


def _running(paid: np.ndarray, value: np.ndarray, discount: float) -> np.ndarray:
    """`sum_{k<t} g^k paid_k + g^t V(s_t)`, `[N, T+1]`, for all t from 0 to T."""
    weight = discount ** np.arange(value.shape[1])
    before = np.concatenate([np.zeros((len(paid), 1)), np.cumsum(weight[:-1] * paid, axis=1)], axis=1)
    return before + weight * value


def _drawing(problem: Problem) -> dict[str, np.ndarray]:
    """The grid of a problem as arrays."""
    m = problem.mdp
    if m.grid is None:
        raise ValueError("the states of this problem are not cells of a grid; take one of: grid_world, slippery_grid")
    names = np.full(m.n_states, "", dtype="U16")
    for name, states in problem.marks.items():
        names[list(states)] = name
    return {"grid": np.array(m.grid), "marks": names, "actions": np.array(problem.actions)}


def _regulariser(alpha: float, beta: ArrayLike, prior: Sequence[float] | None = None) -> Regulariser:
    """KL at alpha = 1, which has a closed form."""
    p0 = _prior(prior)
    return families.kl(beta, p0) if alpha == 1 else families.alpha(alpha, beta, p0)


def _prior(prior: Sequence[float] | None) -> np.ndarray | None:
    return None if prior is None else _axis("prior", prior)


def _axis(name: str, values: Sequence[float]) -> np.ndarray:
    """The numbers along one axis of a figure."""
    array = np.asarray(values, float)
    if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"{name} is {values!r}; expected a list of numbers, all finite")
    return array


def _seed(seed: int) -> int:
    """A seed that every generator takes."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}; expected a whole number from 0 to {2**32 - 1}")
    return seed


def _start(m: MDP, value: jax.Array) -> jax.Array:
    return jnp.sum(m.initial * value)


def _arrays(**numbers: object) -> Numbers:
    return {name: np.asarray(x) for name, x in numbers.items()}
