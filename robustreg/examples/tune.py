r"""How much to regularise, and towards what? Strength and prior learned over a family of problems.

**The problem.** Problems of one family come again and again: different transitions and rewards, the same kinds of
actions, some of which tend to be better. Of each one sees a reward with errors, plans for it, and earns the true one.
Without a regulariser a plan chases the errors; with a strong one it ignores the reward.

**The identity.** beta and the prior are leaves of the regulariser, so the true return of the plan is a function of both
that JAX differentiates: through `rr.evaluate` to the policy, and through `rr.solve`, by the implicit function theorem,
to beta and the prior. Past problems, whose true rewards are known by now, are one batch; their mean return is climbed
by Adam. Nothing else is known of the family.

**What is claimed.** (1) The meta-gradient agrees with finite differences. (2) On problems that were not trained on,
with returns by a linear solve in NumPy, the tuned regulariser earns more than the one that training began with, and
more than none, each by more than two standard errors of the difference.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import robustreg as rr
from robustreg.examples.report import Claim, Report
from robustreg.figures import style

HARD = 1e4  # a beta at which a policy is deterministic for all purposes


def family(seed: int, count: int, sizes: dict[str, int], noise: float, lean: float) -> tuple[rr.MDP, jax.Array]:
    """Draw problems of the family, in a batch; return them with what is seen of their rewards, `[N, S, A]`."""
    m = rr.problems.garnets(count, **sizes, discount=0.9, seed=seed)
    better = lean * jnp.linspace(1, -1, m.n_actions, dtype=m.dtype)
    true = dataclasses.replace(m, reward=m.reward + better)
    return true, true.reward + noise * jax.random.normal(jax.random.key(seed), true.reward.shape, m.dtype)


def regulariser(meta: dict[str, jax.Array]) -> Any:
    """Build the regulariser of the meta-parameters: `log_beta` and `logits [A]`."""
    return rr.kl(beta=jnp.exp(meta["log_beta"]), log_prior=jax.nn.log_softmax(meta["logits"]))


def plan(seen: jax.Array, m: rr.MDP, meta: dict[str, jax.Array]) -> jax.Array:
    """Plan for the rewards that are seen, `[N, S, A]`."""
    return rr.solve(dataclasses.replace(m, reward=seen), regulariser(meta)).policy


def earned(m: rr.MDP, seen: jax.Array, meta: dict[str, jax.Array]) -> jax.Array:
    """Mean true return of the plans."""
    return jnp.mean(rr.evaluate(m, plan(seen, m, meta)) @ m.initial)


def tune(m: rr.MDP, seen: jax.Array, meta: Any, steps: int, rate: float) -> tuple[Any, jax.Array]:
    """Climb the mean return; return the meta-parameters with the return at every step."""
    descent = optax.adam(rate)

    def step(carry: Any, _: None) -> tuple[Any, jax.Array]:
        value, slope = jax.value_and_grad(lambda meta: -earned(m, seen, meta))(carry[0])
        updates, state = descent.update(slope, carry[1])
        return (optax.apply_updates(carry[0], updates), state), -value

    (meta, _), values = jax.jit(lambda c: jax.lax.scan(step, c, None, length=steps))((meta, descent.init(meta)))
    return meta, values


def returns(m: rr.MDP, policy: np.ndarray) -> np.ndarray:
    """True returns of policies, one per problem, `[N]`, by NumPy's linear solve."""
    table: Any = m.transitions
    chain = np.einsum("nsa,nsat->nst", policy, np.asarray(table.probabilities))
    system = np.eye(m.n_states) - float(m.discount) * chain
    reward = (policy * np.asarray(m.reward)).sum(-1)
    return np.linalg.solve(system, reward[..., None])[..., 0] @ np.asarray(m.initial)


def run(
    seed: int = 0,
    problems: int = 32,
    fresh: int = 128,
    n_states: int = 20,
    n_actions: int = 5,
    branching: int = 4,
    noise: float = 0.6,
    lean: float = 0.2,
    beta: float = 1.0,
    steps: int = 150,
    rate: float = 0.05,
) -> Report:
    """Run the pipeline.

    Args:
        seed: of the problems.
        problems, fresh: numbers of problems to tune on, and to judge by.
        n_states, n_actions, branching: of each problem.
        noise: standard deviation of what is seen around the true reward.
        lean: how much better the first action tends to be than the middle one, in reward units.
        beta: to begin with; the prior begins uniform.
        steps, rate: of tuning, by Adam.
    """
    sizes = {"n_states": n_states, "n_actions": n_actions, "branching": branching}
    m, seen = family(seed * 100_003, problems, sizes, noise, lean)
    first = {"log_beta": jnp.log(jnp.asarray(beta, m.dtype)), "logits": jnp.zeros(n_actions, m.dtype)}
    tuned, values = tune(m, seen, first, steps, rate)
    slope = jax.jit(jax.grad(partial(earned, m, seen)))(first)
    difference = central(jax.jit(partial(earned, m, seen)), first)

    new, new_seen = family(seed * 100_003 + problems, fresh, sizes, noise, lean)
    none = {"log_beta": jnp.log(jnp.asarray(HARD, m.dtype)), "logits": jnp.zeros(n_actions, m.dtype)}
    metas = {"none": none, "to begin with": first, "tuned": tuned}
    policies = [np.asarray(plan(new_seen, new, meta)) for meta in metas.values()]
    numbers = {
        "regulariser": np.array(list(metas)),
        "beta": np.array([float(jnp.exp(meta["log_beta"])) for meta in metas.values()]),
        "prior": np.stack([jax.nn.softmax(meta["logits"]) for meta in metas.values()]),
        "earned": np.stack([returns(new, policy) for policy in policies]),
        "tuning": np.asarray(values),
        "slope": np.append(slope["logits"], slope["log_beta"]),
        "difference": difference,
    }
    return Report(_rows(numbers), numbers, claims(numbers), lambda: draw(numbers))


def central(f: Any, meta: dict[str, jax.Array], h: float = 1e-5) -> np.ndarray:
    """Differences of f, central ones, in the logits and then in log beta, `[A + 1]`."""

    def along(direction: np.ndarray) -> float:
        ends = [
            f({"logits": meta["logits"] + s * h * direction[:-1], "log_beta": meta["log_beta"] + s * h * direction[-1]})
            for s in (1, -1)
        ]
        return float(ends[0] - ends[1]) / (2 * h)

    return np.array([along(direction) for direction in np.eye(len(meta["logits"]) + 1)])


def _rows(numbers: dict[str, Any]) -> list[dict[str, str]]:
    """Rows of the table: means over fresh problems."""
    columns = zip(numbers["regulariser"], numbers["beta"], numbers["prior"], numbers["earned"].mean(1))
    return [
        {"regulariser": name, "beta": f"{beta:.3g}", "prior": " ".join(f"{p:.2f}" for p in prior), "earned": f"{x:.3f}"}
        for name, beta, prior, x in columns
    ]


def claims(numbers: dict[str, Any]) -> list[Claim]:
    """Check what the docstring of this module claims."""
    off = float(np.abs(numbers["slope"] - numbers["difference"]).max() / np.abs(numbers["difference"]).max())
    made = [Claim(f"the meta-gradient agrees with differences to {off:.0e} (1e-5)", off <= 1e-5)]
    none, first, tuned = numbers["earned"]
    for name, other in (("none", none), ("the one to begin with", first)):
        more, doubt = (tuned - other).mean(), 2 * (tuned - other).std(ddof=1) / np.sqrt(len(tuned))
        made.append(Claim(f"the tuned regulariser earns {more:.3f} ± {doubt:.3f} more than {name}", more > doubt))
    return made


def draw(numbers: dict[str, Any]) -> Any:
    """Draw the tuning, the prior that came of it, and what is earned on fresh problems."""
    figure = style.new_figure(12.0, 4.0)
    tuning, prior, earned = figure.subplots(1, 3)
    tuning.plot(numbers["tuning"], color=BLUE)
    tuning.set(xlabel="step of tuning", ylabel="mean true return (reward units)", title="Problems to tune on")
    actions = np.arange(numbers["prior"].shape[1])
    prior.bar(actions, numbers["prior"][-1], color=BLUE, width=0.6)
    prior.axhline(1 / len(actions), color=style.INK, linestyle="--", label="to begin with")
    prior.set(xlabel="action", ylabel="probability", title=f"Tuned prior (tuned β = {numbers['beta'][-1]:.2g})")
    prior.set_xticks(actions)
    prior.legend(frameon=False)
    mean, error = numbers["earned"].mean(1), numbers["earned"].std(1) / np.sqrt(numbers["earned"].shape[1])
    earned.errorbar(np.arange(3), mean, yerr=2 * error, fmt="o", color=VERMILION, capsize=4)
    earned.set_xticks(np.arange(3), numbers["regulariser"])
    earned.set(xlim=(-0.5, 2.5), xlabel="regulariser", ylabel="mean true return (reward units)")
    earned.set_title("Fresh problems (± two standard errors)")
    return figure


BLUE, VERMILION = "#0072b2", "#d55e00"
