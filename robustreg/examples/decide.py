r"""Learning transitions for the decision they serve, where no model of the class is right.

**The problem.** Moves on a field go as intended, or to the left or right of it. How often, is to be learned from counts
of trials. The model has one chance of slipping for the whole field, a single number. That is wrong: the left
half is icy, the right half is not. The most likely model has the average slip, too little for one half and too much for
the other: too much for the narrow path on the right, between water, that leads to the goal.

**Which wrong model is best?** The one whose policy does best. Let `p(w)` be the regularised policy that `rr.solve`
finds in the model w, and `J(p)` its regularised return in the MDP of the raw counts: what the policy is guaranteed
there, whatever the adversary takes from the reward within its robust set. Then

    maximise J(p(w)),          dJ/dw = dJ/dp dp/dw,

where dJ/dp goes through `rr.evaluate` and dp/dw through `rr.solve`, both by the implicit function theorem: two linear
solves per gradient, however many backups the solution took. Likelihood asks the model to be right everywhere on
average; this asks it to be right where the decision depends on it [Nikishin et al. 2022]. (The policy of the raw counts
themselves is shown too. It needs a number per state, action and outcome, where the model has one.)

**What is claimed.** (1) The gradient of the whole pipeline agrees with a finite difference. (2) In the true MDP, by a
linear solve in NumPy, models learned for the decision guarantee more than most likely ones, on average over data sets
by more than two standard errors of the difference. (3) They do worse as a description: their likelihood is lower.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import robustreg as rr
from robustreg.examples.report import Claim, Problem, Report
from robustreg.figures import style


class Field(NamedTuple):
    """A grid world taken apart: where moves lead, and what is paid.

    `leads` is of zeros and ones: where moves lead as intended, to their right, and to their left.
    """

    leads: np.ndarray  # [3, S, A, S]
    icy: np.ndarray  # [S], truth values
    cost: np.ndarray  # [S], what a step from a cell pays
    arrival: np.ndarray  # [S], what entering a cell pays


def take_apart(problem: Problem) -> Field:
    """Read a grid world without slipping; its left half is icy."""
    m = problem.mdp
    table = np.moveaxis(np.asarray(m.transitions.expect(jnp.eye(m.n_states, dtype=m.dtype))), 0, -1)
    if m.grid is None or "goal" not in problem.marks or (table.max(-1) < 1).any():
        raise ValueError("the problem must be a grid_world with a goal and with slip = 0: slipping is to be learned")
    reward, arrival = np.asarray(m.reward), np.zeros(m.n_states)
    cost = reward.min(-1)
    arrival[list(problem.marks["goal"])] = (reward - cost[:, None]).max()
    leads = np.stack([table, np.roll(table, -1, axis=1), np.roll(table, 1, axis=1)])
    icy = np.arange(m.n_states) % m.grid[1] < m.grid[1] // 2
    alive = np.ones(m.n_states)
    alive[list(problem.marks["goal"])] = 0
    leads = np.where(alive[:, None, None] > 0, leads, np.eye(m.n_states)[:, None, :])
    return Field(leads, icy, cost * alive, arrival)


def chances(slip: Any) -> Any:
    """Chances of the three outcomes, the last axis, if a share `slip` of the moves goes to either side."""
    return jnp.stack([1 - slip, slip / 2, slip / 2], -1)


def planned(m: rr.MDP, field: Field, table: Any) -> rr.MDP:
    """Give the MDP other transitions, `[*B, S, A, S]`."""
    alive = (field.cost != 0)[:, None]
    reward = field.cost[:, None] + alive * (table @ field.arrival)
    return dataclasses.replace(m, transitions=rr.Dense(jnp.asarray(table)), reward=jnp.asarray(reward))


def of_slip(m: rr.MDP, field: Field, slip: jax.Array) -> rr.MDP:
    """Build the model, `[N]` of them at once."""
    return planned(m, field, jnp.einsum("nk,ksat->nsat", chances(slip), field.leads))


def true_table(field: Field, icy: float, dry: float) -> np.ndarray:
    """Build the true transitions, which slip on ice more than elsewhere."""
    return np.einsum("sk,ksat->sat", chances(np.where(field.icy, icy, dry)), field.leads)


def likelihood(field: Field, slip: jax.Array, counts: jax.Array) -> jax.Array:
    """Mean log-likelihood of outcomes `counts [N, S, A, S]`, `[N]`."""
    table = jnp.einsum("nk,ksat->nsat", chances(slip), field.leads)
    seen = counts > 0
    return jnp.sum(jnp.where(seen, counts * jnp.log(jnp.where(seen, table, 1)), 0), (1, 2, 3)) / counts.sum((1, 2, 3))


def decision(m: rr.MDP, field: Field, reg: Any, slip: jax.Array, counts: jax.Array) -> jax.Array:
    """Compute what the model's policy is guaranteed in the MDP of the counts, `[N]`."""
    policy = rr.solve(of_slip(m, field, slip), reg).policy
    frequencies = counts / counts.sum(-1, keepdims=True)
    return rr.evaluate(planned(m, field, frequencies), policy, reg) @ m.initial


def climb(objective: Callable[[jax.Array], jax.Array], start: jax.Array, steps: int, rate: float) -> jax.Array:
    """Maximise the objectives of many data sets at once over the logits of their slips, `[N]`, by Adam."""
    descent = optax.adam(optax.cosine_decay_schedule(rate, steps, alpha=0.05))

    def step(carry: Any, _: None) -> tuple[Any, None]:
        slope = jax.grad(lambda x: -jnp.sum(objective(jax.nn.sigmoid(x))))(carry[0])
        updates, state = descent.update(slope, carry[1])
        return (optax.apply_updates(carry[0], updates), state), None

    (logits, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, None, length=steps))((start, descent.init(start)))
    return jax.nn.sigmoid(logits)


def guaranteed(m: rr.MDP, policy: np.ndarray, table: np.ndarray, reward: np.ndarray, beta: float) -> np.ndarray:
    """Compute the regularised return of policies `[N, S, A]` in the true MDP, `[N]`, by NumPy's linear solve."""
    logs = np.where(policy > 0, np.log(np.where(policy > 0, policy, 1) * policy.shape[-1]), 0)
    earned = (policy * (reward - logs / beta)).sum(-1)
    system = np.eye(len(table)) - float(m.discount) * np.einsum("nsa,sat->nst", policy, table)
    return np.linalg.solve(system, earned[..., None])[..., 0] @ np.asarray(m.initial)


def run(
    problem: Problem,
    seed: int = 0,
    sets: int = 20,
    trials: int = 20,
    icy: float = 0.5,
    dry: float = 0.02,
    beta: float = 10.0,
    steps: int = 60,
    rate: float = 0.2,
) -> Report:
    """Run the pipeline.

    Args:
        problem: a grid world with slip = 0.
        seed: of the data.
        sets: data sets to learn from, independent of each other.
        trials: of each action in each cell.
        icy, dry: true chances of slipping in the left half and elsewhere.
        beta: inverse strength of the regulariser.
        steps, rate: of learning, by Adam.
    """
    m, field, reg = problem.mdp, take_apart(problem), rr.kl(beta=beta)
    table = true_table(field, icy, dry)
    counts = jnp.asarray(np.random.default_rng(seed).multinomial(trials, table, (sets, *table.shape[:2])), m.dtype)
    likely = climb(lambda slip: likelihood(field, slip, counts), jnp.zeros(sets, m.dtype), 2 * steps, rate)
    gain = jax.jit(partial(decision, m, field, reg))
    start = jnp.log(likely) - jnp.log1p(-likely)
    useful = climb(lambda slip: decision(m, field, reg, slip, counts), start, steps, rate)
    slope = jax.jit(jax.grad(lambda slip: jnp.sum(gain(slip, counts))))(likely)
    difference = (gain(likely + 1e-5, counts) - gain(likely - 1e-5, counts)) / 2e-5

    truth = planned(m, field, table)
    models = {"most likely": of_slip(m, field, likely), "for the decision": of_slip(m, field, useful)}
    models["raw counts"] = planned(m, field, counts / trials)
    policies = {name: np.asarray(rr.solve(model, reg).policy) for name, model in models.items()}
    worth = [guaranteed(m, p, table, np.asarray(truth.reward), beta) for p in policies.values()]
    slips = jnp.linspace(0.01, 0.45, sets)  # as many as data sets: no new program
    curve = np.asarray(rr.solve(of_slip(m, field, slips), reg).policy)
    numbers = {
        "model": np.array(list(models)),
        "guaranteed": np.stack(worth),
        "optimum": np.asarray(rr.solve(truth, reg).objective),
        "slip": np.stack([likely, useful]),
        "likelihood": np.stack([likelihood(field, likely, counts), likelihood(field, useful, counts)]),
        "slope": np.asarray(slope),
        "difference": np.asarray(difference),
        "curve_slip": np.asarray(slips),
        "curve": guaranteed(m, curve, table, np.asarray(truth.reward), beta),
    }
    return Report(_rows(numbers), numbers, claims(numbers), lambda: draw(numbers))


def _rows(numbers: dict[str, Any]) -> list[dict[str, str]]:
    """Rows of the table: means over data sets."""
    slips = [f"{x:.3f}" for x in numbers["slip"].mean(1)] + ["per cell"]
    logs = [f"{x:.4f}" for x in numbers["likelihood"].mean(1)] + [""]
    worth = [f"{x:.3f}" for x in numbers["guaranteed"].mean(1)]
    rows = [
        {"model": name, "slip": slip, "log-likelihood": log, "guaranteed, truly": value}
        for name, slip, log, value in zip(numbers["model"], slips, logs, worth)
    ]
    best = {
        "model": "the truth",
        "slip": "per cell",
        "log-likelihood": "",
        "guaranteed, truly": f"{numbers['optimum']:.3f}",
    }
    return [*rows, best]


def claims(numbers: dict[str, Any]) -> list[Claim]:
    """Check what the docstring of this module claims."""
    likely, useful = numbers["guaranteed"][:2]
    more, doubt = (useful - likely).mean(), 2 * (useful - likely).std(ddof=1) / np.sqrt(len(likely))
    off = float(np.abs(numbers["slope"] - numbers["difference"]).max() / np.abs(numbers["difference"]).max())
    worse = float((numbers["likelihood"][0] - numbers["likelihood"][1]).min())
    return [
        Claim(f"the gradient agrees with a finite difference to {off:.0e} (1e-5)", off <= 1e-5),
        Claim(f"models for the decision guarantee {more:.3f} ± {doubt:.3f} more", more > doubt),
        Claim(f"their mean log-likelihood is lower in every data set, by {worse:.4f} or more", worse > 0),
    ]


def draw(numbers: dict[str, Any]) -> Any:
    """Draw what the policy of each slip is truly guaranteed, and where both ways of learning end."""
    figure = style.new_figure(7.5, 4.6)
    axes = figure.subplots()
    axes.plot(numbers["curve_slip"], numbers["curve"], color="#9a9a9a", label="policy of the model with this slip")
    axes.axhline(numbers["optimum"], color=style.INK, linestyle="--", label="policy of the true transitions")
    for i, (colour, marker) in enumerate(((VERMILION, "s"), (BLUE, "o"))):
        name = f"learned: {numbers['model'][i]}"
        axes.plot(numbers["slip"][i], numbers["guaranteed"][i], marker, color=colour, alpha=0.6, label=name)
    axes.set(xlabel="slip of the model (probability)", ylabel="guaranteed return, truly (reward units)")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure


BLUE, VERMILION = "#0072b2", "#d55e00"
