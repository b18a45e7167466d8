r"""What did they want? Rewards from demonstrations, by maximum-entropy inverse reinforcement learning.

**The problem.** An expert acts by the policy that is optimal for a reward under KL regularisation. We see drives of
the expert, not the reward. Each (state, action) has features `f(s, a)`, the ground that it leads to, and the reward is
what is known (a pay at the goal, a cost per step) plus `<w, f>` for unknown weights.

**The identity.** Let `J(w)` be the regularised optimal return, and `m` the discounted sums of features that the
demonstrations collect on average. By Danskin's theorem the gradient of J is the features that the *optimal policy of w*
collects, its occupancy times f. So the negative log-likelihood of maximum-entropy IRL [Ziebart et al. 2008],

    L(w) = J(w) - <w, m>,          grad L = (features of the policy of w) - m,

is convex, and at its minimum the policy collects exactly what the demonstrations collect. That is all that data can
say: rewards that differ by a potential `g E[h(s')] - h(s)` have the same policy, and so only policies are compared.
(Were the pay at the goal to be learned too, one combination of weights would be such a potential: nobody could tell it,
and features of finitely many drives would be ones that no policy has.)

**How.** `jax.value_and_grad` through `rr.solve` gives the gradient by the implicit function theorem. The weights take
steps of Newton's method, whose curvature is a derivative of that gradient, inside one `lax.scan`. Its carry holds the
value of the last solve: each solve begins where the last one ended (`init=`), and takes a few backups.

**What is claimed.** (1) The features of the learned policy match the demonstrations' to the tolerance stated. (2) Had
one all the expert's drives (its exact occupancy), the learned policy would be the expert's: the KL between the two, per
step and weighted by the expert's visits, vanishes up to the accuracy of the optimisation. (3) With a finite number of
drives it falls as the number grows, about like 1/number: what is left is the sampling error. (4) Starting warm costs
fewer backups than starting cold. KL between policies is computed in NumPy.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import robustreg as rr
from robustreg.examples.report import Claim, Problem, Report
from robustreg.figures import style


class Fit(NamedTuple):
    """Hold what a number of demonstrations teaches."""

    weights: jax.Array  # [F]
    log_policy: jax.Array  # [S, A]
    mismatch: jax.Array  # largest difference of features, in units of the largest feature sum
    losses: jax.Array  # [steps]
    backups: jax.Array  # [steps]


def features(m: rr.MDP, kinds: int, key: jax.Array) -> jax.Array:
    """Draw features `[S, A, F]`: what kind of ground the action leads to."""
    kind = jax.nn.one_hot(jax.random.randint(key, (m.n_states,), 0, kinds), kinds, dtype=m.dtype)
    alive = jnp.any(m.reward != 0, -1)[:, None]  # nothing happens beyond the goal
    return jnp.moveaxis(m.transitions.expect((kind * alive).T), 0, -1) * alive[..., None]


def of_weights(m: rr.MDP, table: jax.Array, weights: jax.Array) -> rr.MDP:
    """Add the reward of these weights to what is known."""
    return dataclasses.replace(m, reward=m.reward + table @ weights)


def collected(m: rr.MDP, table: jax.Array, policy: jax.Array) -> jax.Array:
    """Expected discounted sums of features, `[F]`."""
    return jnp.einsum("sa,saf->f", rr.occupancy(m, policy), table)


def demonstrate(m: rr.MDP, policy: jax.Array, table: jax.Array, key: jax.Array, count: int, length: int) -> jax.Array:
    """Drive `count` times and add up discounted features, `[count, F]`."""
    chances = jnp.log(jnp.moveaxis(m.transitions.expect(jnp.eye(m.n_states, dtype=m.dtype)), 0, -1))

    def step(s: jax.Array, at: Any) -> tuple[jax.Array, jax.Array]:
        k, t = at
        of_action, of_state = jax.random.split(k)
        a = jax.random.categorical(of_action, jnp.log(policy[s]))
        return jax.random.categorical(of_state, chances[s, a]), m.discount**t * table[s, a]

    def drive(key: jax.Array) -> jax.Array:
        first, rest = jax.random.split(key)
        start = jax.random.categorical(first, jnp.log(m.initial))
        times = jnp.arange(length, dtype=m.dtype)
        return jnp.sum(jax.lax.scan(step, start, (jax.random.split(rest, length), times))[1], 0)

    return jax.vmap(drive)(jax.random.split(key, count))


@partial(jax.jit, static_argnames="steps")
def learn(m: rr.MDP, reg: Any, table: jax.Array, seen: jax.Array, steps: int, warm: bool = True) -> Fit:
    """Minimise L from zero weights.

    Args:
        m: the MDP, with what is known of its reward.
        reg: the regulariser of the expert.
        table: features `[S, A, F]`.
        seen: average discounted sums of features of the demonstrations, `[F]`.
        steps: of Newton's method.
        warm: whether each solve begins where the last one ended.
    """

    def slope(w: jax.Array, start: jax.Array) -> tuple[jax.Array, Any]:
        def loss(w: jax.Array) -> tuple[jax.Array, rr.Solution]:
            sol = rr.solve(of_weights(m, table, w), reg, init=start)
            return sol.objective - w @ seen, sol

        (value, sol), g = jax.value_and_grad(loss, has_aux=True)(w)
        return g, (g, value, sol.value, sol.steps)

    def step(carry: tuple[jax.Array, jax.Array], _: None) -> tuple[Any, Any]:
        w, start = carry
        curvature, (g, value, reached, backups) = jax.jacfwd(slope, has_aux=True)(w, start)
        newton = jnp.linalg.solve(curvature + 1e-12 * jnp.trace(curvature) * jnp.eye(w.size, dtype=w.dtype), g)
        # In nats (times beta) L is a log-likelihood. A step damped by the decrement cannot overshoot [Nesterov 2004].
        decrement = jnp.sqrt(jnp.maximum(reg.beta * g @ newton, 0))
        return (w - newton / (1 + decrement), jnp.where(warm, reached, start)), (value, backups)

    start = jnp.zeros_like(seen), jnp.zeros(m.n_states, m.dtype)
    (w, _), (losses, backups) = jax.lax.scan(step, start, None, length=steps)
    sol = rr.solve(of_weights(m, table, w), reg)
    mismatch = jnp.max(jnp.abs(collected(m, table, sol.policy) - seen)) / jnp.max(jnp.abs(seen))
    # (From the perturbation, which is exact where probabilities underflow.)
    return Fit(w, reg.beta * sol.perturbation - np.log(m.n_actions), mismatch, losses, backups)


def divergence(m: rr.MDP, expert: Any, learned: Any) -> float:
    """KL of a learned log-policy from the expert's policy per step, in nats, weighted by the expert's visits."""
    p, visits = np.asarray(expert), np.asarray(rr.occupancy(m, expert)).sum(-1)
    each = np.where(p > 0, p * (np.log(np.where(p > 0, p, 1)) - np.asarray(learned)), 0).sum(-1)
    acting = np.asarray(m.reward).any(-1)
    return float((visits * each)[acting].sum() / visits[acting].sum())


def run(
    problem: Problem,
    seed: int = 0,
    kinds: int = 6,
    beta: float = 4.0,
    drives: Sequence[int] = (50, 500, 5000),
    repeats: int = 4,
    length: int = 150,
    steps: int = 30,
) -> Report:
    """Run the pipeline.

    Args:
        problem: a grid world, with what is known of its reward.
        seed: of ground, weights and drives.
        kinds: of ground.
        beta: of the expert's regulariser.
        drives: numbers of demonstrations to learn from.
        repeats: independent sets of demonstrations of each number.
        length: steps of a drive.
        steps: of Newton's method.
    """
    m, reg, keys = problem.mdp, rr.kl(beta=beta), jax.random.split(jax.random.key(seed), 3)
    table = features(m, kinds, keys[0])
    truth = -jax.random.uniform(keys[1], (kinds,), m.dtype, 0.0, 1.0)
    expert = rr.solve(of_weights(m, table, truth), reg).raise_if_failed().policy
    exact = learn(m, reg, table, collected(m, table, expert), steps)
    cold = learn(m, reg, table, collected(m, table, expert), steps, warm=False)
    sums = demonstrate(m, expert, table, keys[2], max(drives) * repeats, length)
    fits = {n: [learn(m, reg, table, x.mean(0), steps) for x in _groups(sums, n, repeats)] for n in drives}
    gaps = {n: np.array([divergence(m, expert, fit.log_policy) for fit in group]) for n, group in fits.items()}
    numbers = {
        "truth": np.asarray(truth),
        "weights": np.asarray(exact.weights),
        "expert": np.asarray(expert),
        "policy": np.exp(exact.log_policy),
        "losses": np.asarray(exact.losses),
        "drives": np.array(list(gaps)),
        "kl": np.stack(list(gaps.values())),
        "kl_exact": np.array(divergence(m, expert, exact.log_policy)),
        "mismatch": np.array([float(max(fit.mismatch for fit in group)) for group in fits.values()]),
        "mismatch_exact": np.asarray(exact.mismatch),
        "backups_warm": np.asarray(exact.backups),
        "backups_cold": np.asarray(cold.backups),
    }
    return Report(_rows(numbers), numbers, claims(numbers), lambda: draw(numbers))


def _groups(sums: jax.Array, count: int, repeats: int) -> list[jax.Array]:
    return [sums[i * count : (i + 1) * count] for i in range(repeats)]


def _rows(numbers: dict[str, Any]) -> list[dict[str, str]]:
    found = [(f"{n:g}", kl.mean(), gap) for n, kl, gap in zip(numbers["drives"], numbers["kl"], numbers["mismatch"])]
    found.append(("all", float(numbers["kl_exact"]), float(numbers["mismatch_exact"])))
    return [{"drives": n, "KL from expert (nats)": f"{kl:.2e}", "mismatch": f"{gap:.1e}"} for n, kl, gap in found]


def claims(numbers: dict[str, Any]) -> list[Claim]:
    """Check what the docstring of this module claims."""
    match = float(max(numbers["mismatch"].max(), numbers["mismatch_exact"]))
    exact, mean = float(numbers["kl_exact"]), numbers["kl"].mean(1)
    warm, cold = int(numbers["backups_warm"].sum()), int(numbers["backups_cold"].sum())
    ratio, expected = mean[0] / mean[-1], numbers["drives"][-1] / numbers["drives"][0]
    return [
        Claim(f"features of demonstrations are matched to {match:.1e} of the largest (1e-5 is asked)", match <= 1e-5),
        Claim(f"from all drives the expert's policy is recovered to a KL of {exact:.1e} nats (1e-9)", exact <= 1e-9),
        Claim(f"KL falls by {ratio:.0f} with {expected:.0f} times the drives (a third asked)", ratio >= expected / 3),
        Claim(f"warm starts take {warm} backups, cold ones {cold}", warm < cold),
    ]


def draw(numbers: dict[str, Any]) -> Any:
    """Draw how the policy approaches the expert's, and both policies' probabilities."""
    figure = style.new_figure(10.5, 4.4)
    left, right = figure.subplots(1, 2)
    for kl in numbers["kl"].T:
        left.plot(numbers["drives"], kl, "o", color=BLUE, alpha=0.5)
    mean = numbers["kl"].mean(1)
    left.plot(numbers["drives"], mean, "-", color=BLUE, label="learned from drives (dots: single sets)")
    sampling = mean[0] * numbers["drives"][0] / numbers["drives"]
    left.plot(numbers["drives"], sampling, "--", color=style.INK, label="1/drives")
    left.set(xscale="log", yscale="log", xlabel="demonstrations (drives)")
    left.set_ylabel("KL from the expert's policy (nats per step)")
    left.legend(frameon=False)
    right.plot([0, 1], [0, 1], color="#bbbbbb")
    right.plot(numbers["expert"].ravel(), numbers["policy"].ravel(), ".", color=VERMILION)
    right.set(xlabel="expert's probability of an action", ylabel="learned probability", aspect="equal")
    right.set_title("From all drives")
    left.set_title("From some drives")
    return figure


BLUE, VERMILION = "#0072b2", "#d55e00"
