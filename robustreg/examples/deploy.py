r"""A reward learned from preferences, deployed on the true one: which policies keep their promise, and how often?

**The story.** A robot crosses a field from S to G. It knows the pay at G and the cost of a step; what the ground is
worth, cell by cell, it has to learn. People compare pairs of drives of a base policy, and answer with the noise of
Bradley and Terry: drive 1 is preferred with probability `sigmoid(return 1 - return 2)`. An ensemble of small networks
is fitted to the answers, each to its own bootstrap sample. Their mean is the learned reward `r`; their disagreement
`u(s)`, the root mean square over actions of their standard deviation, tells where it is a guess. Comparisons of drives
of one length say nothing of a common constant, so that each network is shifted to give the base policy the return that
it is known to have: it has been driven for years. Then a policy is computed for `r` and deployed on the true reward,
which it never sees. All of this happens in many *worlds* at once, each with a true reward of its own.

**What goes wrong.** The base policy keeps to the middle of the field. Elsewhere nobody has asked, the networks
extrapolate, and the best policy for `r` drives exactly where they erred in its favour. Its return under `r` is a
promise that it seldom keeps. Entropy makes it worse: its objective counts randomness as income.

**What can be promised.** Whatever the policy p, with d its discounted visits, Omega its regulariser and
`e = r - true` the error of the reward [Fenchel and Young; `rr.guarantee`],

    true return  >=  regularised return under r  -  forfeit,      forfeit = sum_s d(s) Omega*(e(s, .)).

The forfeit is at most 0 exactly where the true reward lies in the policy's robust set (aggregated over its visits), and
at most b in the set widened by b. So the promise is

    regularised return under r  -  budget * sum_s d(s) u(s),

and it is kept by *every* true reward in the set widened by that much, an adversary's choice included. The regulariser
lowers the forfeit: by KL to the base policy it keeps the agent where people were asked, and spreads it over actions
whose errors differ. It also lowers the return: the strength beta is a compromise.

**Why the promise holds, and how often.** The score of a world is `forfeit / sum_s d u`: a function of its data and its
true reward. Some *past* worlds have been deployed long since, so that their true rewards are known. They and a new
world are exchangeable. Hence, with n of them, the new score is at most the k-th smallest of theirs with frequency
`coverage` or more, for `k = ceil((n + 1) coverage)` [Vovk, Gammerman, Shafer 2005]: that score is the budget. Nothing
is assumed of networks, noise or disagreement; a poor `u` makes budgets large, not promises false. Beta is the one with
the best mean promise in *design* worlds, which are neither past nor new: otherwise the budget would be tuned to the
very worlds that are to judge it.

A second rule takes as score what was really lost, `(regularised return under r - true return) / sum_s d u`. Its
promises are larger, and hold for worlds like the past ones only: no set of rewards comes with them.

**What is claimed.** Over the new worlds, with true returns by a linear solve in NumPy: (1) calibrated policies keep
their promise with the promised frequency, up to two standard errors (of new and past worlds together; so by chance one
in 40 seeds fails); (2) the unregularised policy does not, by more than five; (3) wherever the true reward lies in the
widened set, the promise is kept, without an exception; (4) with the same budget rule the KL-regularised policy promises
more than the unregularised one. The table states the price of each: what the best policy for `r` earns under `r` on
top.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import robustreg as rr
from robustreg.examples.report import Claim, Problem, Report, standard_error
from robustreg.figures import style

BLUE, VERMILION = "#0072b2", "#d55e00"
HARD = 1e4  # a beta at which a policy is deterministic for all purposes
PENALTY = 3e-3  # on the distance of weights from where they began
FLOOR = 0.02  # least disagreement, in reward units: an ensemble that agrees may still be wrong


class Worlds(NamedTuple):
    """Hold what is learned and true: rewards `[N, S, A]`, and the disagreement of the ensemble `[N, S]`."""

    learned: np.ndarray
    true: np.ndarray
    disagreement: np.ndarray


class Deployed(NamedTuple):
    """One kind of policy in every world, all `[N]`."""

    objective: np.ndarray  # the regularised return under the learned reward
    nominal: np.ndarray  # the plain one
    actual: np.ndarray  # that under the true reward
    forfeit: np.ndarray  # what the error of the reward may cost
    scale: np.ndarray  # disagreement met on the way


class Row(NamedTuple):
    """A policy and its promise in the new worlds, `[N]` each; `inside`: whether the true reward is in its set."""

    name: str
    beta: float
    promise: np.ndarray
    inside: np.ndarray
    deployed: Deployed
    calibrated: bool


# ---- worlds: a true reward, drives, answers, an ensemble


def true_cells(key: jax.Array, places: Any, spread: float) -> jax.Array:
    """Draw what the cells are worth, `[S]`: a smooth field of eight random waves."""
    k = jax.random.split(key, 3)
    direction, phase = 2 * jax.random.normal(k[0], (8, 2)), 2 * jnp.pi * jax.random.uniform(k[1], (8,))
    return jnp.cos(places @ direction.T + phase) @ (0.5 * spread * jax.random.normal(k[2], (8,)))


def drive(key: jax.Array, start: jax.Array, steps: jax.Array, length: int) -> jax.Array:
    """Count the visits to each cell, `[S]`, of one drive; `steps [S, S]` are log-probabilities of the next cell."""

    def step(s: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jax.random.categorical(k, steps[s]), jax.nn.one_hot(s, steps.shape[0])

    return jnp.sum(jax.lax.scan(step, start, jax.random.split(key, length))[1], 0)


def answers(key: jax.Array, cells: jax.Array, start: jax.Array, steps: jax.Array, pairs: int, length: int) -> jax.Array:
    """Compare pairs of drives: visits of the preferred one less those of the other, `[pairs, S]`."""
    of_drives, of_people = jax.random.split(key)
    visits = jax.vmap(drive, (0, None, None, None))(jax.random.split(of_drives, 2 * pairs), start, steps, length)
    difference = visits[:pairs] - visits[pairs:]
    first = jax.random.bernoulli(of_people, jax.nn.sigmoid(difference @ cells))
    return (jnp.where(first, 1.0, -1.0)[:, None] * difference).astype(jnp.float32)


def network(weights: Any, places: jax.Array) -> jax.Array:
    """Compute what a network thinks that cells are worth, `[S]`."""
    return jnp.tanh(places @ weights["in"] + weights["bias"]) @ weights["out"]


def initial_weights(key: jax.Array, width: int = 16) -> Any:
    """Draw the weights of an untrained network, in single precision."""
    k = jax.random.split(key, 3)
    sizes = {"in": (2, width), "bias": (width,), "out": (width,)}
    scales = {"in": 1.4, "bias": 1.0, "out": 0.6 * width**-0.5}
    return {name: scales[name] * jax.random.normal(key, sizes[name], jnp.float32) for name, key in zip(sizes, k)}


def fit(key: jax.Array, won: jax.Array, places: jax.Array, steps: int) -> jax.Array:
    """Train one network on a bootstrap sample of the answers; return its cells, `[S]`.

    It is held to where it began, not to zero: where nothing was asked, the members of an ensemble then go on
    disagreeing [Pearce et al. 2020].
    """
    of_weights, of_sample = jax.random.split(key)
    times = jax.random.poisson(of_sample, 1.0, won.shape[:1]).astype(jnp.float32)
    descent, first = optax.adam(0.03), initial_weights(of_weights)

    def loss(weights: Any) -> jax.Array:
        misfit = jnp.mean(times * jax.nn.softplus(-won @ network(weights, places)))
        return misfit + PENALTY * optax.tree.norm(optax.tree.sub(weights, first), squared=True)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        updates, state = descent.update(jax.grad(loss)(carry[0]), carry[1])
        return (optax.apply_updates(carry[0], updates), state), None

    (weights, _), _ = jax.lax.scan(step, (first, descent.init(first)), None, length=steps)
    return network(weights, places)


def make_worlds(m: rr.MDP, base: jax.Array, key: jax.Array, count: int, options: dict[str, Any]) -> Worlds:
    """Draw true rewards, ask people, train ensembles: everything that happens before a policy is made."""
    table, places, alive = transitions(m), coordinates(m), np.asarray(m.reward).any(-1)
    steps = jnp.log(jnp.einsum("sa,sat->st", base, table))
    start, members = jnp.argmax(m.initial), options["members"]
    entries = jnp.where(alive, jnp.einsum("sa,sat->t", rr.occupancy(m, base), table), 0)

    def world(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        k = jax.random.split(key, 3)
        cells = jnp.where(alive, true_cells(k[0], places, options["spread"]), 0)
        won = answers(k[1], cells, start, steps, options["pairs"], options["length"])
        single = jnp.asarray(places, jnp.float32)
        guesses = jax.vmap(fit, (0, None, None, None))(jax.random.split(k[2], members), won, single, options["steps"])
        return cells, jnp.where(alive, guesses + ((cells - guesses) @ entries / jnp.sum(entries))[:, None], 0)

    cells, guesses = map(np.asarray, jax.jit(jax.vmap(world))(jax.random.split(key, count)))
    # Reward is for the cell that is entered: an action is worth what its outcomes are.
    entered = np.einsum("sat,nkt->nksa", table, guesses.astype(table.dtype))
    known, truth = np.asarray(m.reward), np.einsum("sat,nt->nsa", table, cells)
    return Worlds(known + entered.mean(1), known + truth, np.sqrt(entered.var(1).mean(-1)) + FLOOR)


def transitions(m: rr.MDP) -> np.ndarray:
    """Read the table `[S, A, S]`, whatever form the MDP keeps."""
    return np.moveaxis(np.asarray(m.transitions.expect(jnp.eye(m.n_states, dtype=m.dtype))), 0, -1)


def coordinates(m: rr.MDP) -> np.ndarray:
    """Places of the cells, `[S, 2]`, from -1 to 1."""
    if m.grid is None:
        raise ValueError("the problem is no grid: take kind grid_world or slippery_grid")
    sides = [np.linspace(-1, 1, n) for n in m.grid]
    return np.stack(np.meshgrid(*sides, indexing="ij"), -1).reshape(-1, 2)


# ---- policies, deployed


def deploy(m: rr.MDP, reg: rr.Regulariser, worlds: Worlds) -> Deployed:
    """Solve for the learned rewards, all worlds in one batch, and see what the policies get on the true ones."""
    learned = dataclasses.replace(m, reward=jnp.asarray(worlds.learned))
    sol = rr.solve(learned, reg, tol=1e-4).raise_if_failed()
    visits = np.asarray(rr.occupancy(learned, sol.policy)).sum(-1)
    error = worlds.learned - worlds.true
    forfeit = -np.asarray(rr.aggregated_slack(learned, reg, None, error, visits=visits))
    nominal, actual = (exact_return(m, np.asarray(sol.policy), r) for r in (worlds.learned, worlds.true))
    objective = np.asarray(sol.lower @ m.initial)
    return Deployed(objective, nominal, actual, forfeit, (visits * worlds.disagreement).sum(-1))


def exact_return(m: rr.MDP, policy: np.ndarray, reward: np.ndarray) -> np.ndarray:
    """Expected return of policies `[N, S, A]`, `[N]`, by NumPy's linear solve: nothing of the library takes part."""
    chains = np.einsum("nsa,sat->nst", policy, transitions(m))
    system = np.eye(m.n_states) - float(m.discount) * chains
    return np.linalg.solve(system, (policy * reward).sum(-1)[..., None])[..., 0] @ np.asarray(m.initial)


SCORES = {"set": lambda d: d.forfeit / d.scale, "outcome": lambda d: (d.objective - d.actual) / d.scale}


def budget(scores: np.ndarray, coverage: float) -> float:
    """Take the smallest known score that a new one exceeds with frequency `1 - coverage` at most; infinite if none."""
    n = len(scores)
    k = n + 1 - int(np.floor((n + 1) * (1 - coverage) + 1e-9))
    return float(np.sort(scores)[k - 1]) if k <= n else np.inf


def calibrate(rule: str, tried: dict[float, Deployed], parts: Sequence[slice], coverage: float) -> tuple:
    """Choose beta in the design worlds, then the budget in the past ones.

    Args:
        rule: a key of `SCORES`.
        tried: what each beta gives in all worlds.
        parts: design, past and new worlds.
        coverage: frequency to promise.

    Returns:
        beta, promises in the new worlds, and whether the scores there are within the budget.
    """
    score, (design, past, new) = SCORES[rule], parts

    def promise(d: Deployed, known: slice, where: slice) -> np.ndarray:
        return (d.objective - budget(score(d)[known], coverage) * d.scale)[where]

    beta = max(tried, key=lambda b: promise(tried[b], design, design).mean())
    d = tried[beta]
    return beta, promise(d, past, new), score(d)[new] <= budget(score(d)[past], coverage)


# ---- the pipeline


def run(
    problem: Problem,
    seed: int = 0,
    worlds: int = 1000,
    past: int = 400,
    design: int = 200,
    coverage: float = 0.9,
    strengths: Sequence[float] = (1.0, 2.0, 4.0, 8.0),
    beta: float = 8.0,
    alpha: float = 2.0,
    base_beta: float = 3.0,
    pairs: int = 200,
    length: int = 12,
    members: int = 6,
    steps: int = 100,
    spread: float = 0.4,
) -> Report:
    """Run the pipeline.

    Args:
        problem: a grid world; its reward is what is known of the true one.
        seed: of everything random.
        worlds, past, design: new worlds to judge, past ones to set budgets, others to choose beta.
        coverage: frequency with which promises are to be kept.
        strengths: betas to choose from.
        beta: of the policies that are not calibrated.
        alpha: of the alpha-divergence.
        base_beta: of the base policy, the entropy-regularised one for the known reward.
        pairs, length: comparisons per world, and steps of a drive.
        members, steps: networks of an ensemble, and steps of their training.
        spread: standard deviation of what cells are worth, in reward units.
    """
    m = problem.mdp
    base = rr.solve(m, rr.kl(beta=base_beta)).policy
    options = {"pairs": pairs, "length": length, "members": members, "steps": steps, "spread": spread}
    found = make_worlds(m, base, jax.random.key(seed), design + past + worlds, options)
    parts = (slice(0, design), slice(design, design + past), slice(design + past, None))
    toward = {"log_prior": jnp.log(base)}
    families: dict[str, Callable[[float], rr.Regulariser]] = {
        "KL": lambda b: rr.kl(beta=b, **toward),
        f"alpha {alpha:g}": lambda b: rr.alpha(alpha=alpha, beta=b, **toward),
    }
    tried = {name: {b: deploy(m, make(b), found) for b in {*strengths, beta}} for name, make in families.items()}
    tried = {"unregularised": {HARD: deploy(m, families["KL"](HARD), found)}, **tried}
    raw = {"unregularised": (HARD, tried["unregularised"][HARD]), "entropy": (beta, deploy(m, rr.entropy(beta), found))}
    raw |= {name: (beta, tried[name][beta]) for name in families}
    raw = {name: (b, _some(d, parts[2])) for name, (b, d) in raw.items()}
    rows = [Row(name, b, d.objective, d.forfeit <= 0, d, False) for name, (b, d) in raw.items()]
    rows += [_calibrated(name, rule, tried[name], parts, coverage) for rule in SCORES for name in tried]
    return report(rows, coverage, past)


def _calibrated(name: str, rule: str, tries: dict, parts: Sequence[slice], coverage: float) -> Row:
    beta, promise, inside = calibrate(rule, tries, parts, coverage)
    return Row(f"{name}, by {rule}", beta, promise, inside, _some(tries[beta], parts[2]), True)


def _some(d: Deployed, where: slice) -> Deployed:
    return Deployed(*(x[where] for x in d))


def kept(row: Row) -> float:
    """Tell in which share of the worlds a promise is kept."""
    return float(np.mean(row.deployed.actual >= row.promise))


def report(rows: Sequence[Row], coverage: float, past: int) -> Report:
    """Put rows into a table, numbers, claims and a picture."""
    best = rows[0].deployed.nominal
    printed = [
        {
            "policy": row.name,
            "beta": f"{row.beta:g}",
            "promise": f"{row.promise.mean():.2f}",
            "kept": f"{kept(row):.1%}",
            "in set": f"{row.inside.mean():.1%}",
            "nominal return": f"{row.deployed.nominal.mean():.2f}",
            "price": f"{(best - row.deployed.nominal).mean():.2f}",
            "true return": f"{row.deployed.actual.mean():.2f}",
        }
        for row in rows
    ]
    numbers = {
        "name": np.array([row.name for row in rows]),
        "beta": np.array([row.beta for row in rows]),
        "promise": np.stack([row.promise for row in rows]),
        "inside": np.stack([row.inside for row in rows]),
        "nominal": np.stack([row.deployed.nominal for row in rows]),
        "actual": np.stack([row.deployed.actual for row in rows]),
        "coverage": np.array(coverage),
        "kept": np.array([kept(row) for row in rows]),
    }
    return Report(printed, numbers, claims(rows, coverage, past), lambda: draw(numbers))


def claims(rows: Sequence[Row], coverage: float, past: int) -> list[Claim]:
    """Check what the docstring of this module claims."""
    count = len(rows[0].promise)
    # Over draws of n past worlds the frequency of a budget has the variance c (1 - c)/(n + 2) at most.
    error = np.hypot(standard_error(coverage, count), standard_error(coverage, past + 2))
    least = coverage - 2 * error
    made = []
    for row in (row for row in rows if row.calibrated):
        sentence = f"{row.name}: promises kept in {kept(row):.1%} of worlds, at least {least:.1%}"
        made.append(Claim(sentence, kept(row) >= least))
    hard = kept(rows[0])
    most = coverage - 5 * standard_error(hard, count)
    made.append(Claim(f"unregularised: promises kept in {hard:.1%} of worlds, below {most:.1%}", hard < most))
    # (True returns and forfeits are each as precise as their solves.)
    broken = sum(int(np.sum(row.inside & (row.deployed.actual < row.promise - 1e-3))) for row in rows if _promises(row))
    cases = sum(int(row.inside.sum()) for row in rows if _promises(row))
    made.append(Claim(f"{broken} broken promises in {cases} cases with the true reward in the set", broken == 0))
    named = {row.name: row.promise for row in rows}
    more = named["KL, by set"] - named["unregularised, by set"]
    gain, doubt = more.mean(), 2 * more.std() / np.sqrt(count)
    made.append(Claim(f"by set, KL promises {gain:.2f} ± {doubt:.2f} more than no regulariser", gain > doubt))
    return made


def _promises(row: Row) -> bool:
    """Whether a row comes with a set of rewards whose members keep the promise."""
    return not row.name.endswith("outcome")


# ---- the picture


def draw(numbers: dict[str, Any]) -> Any:
    """Draw how often promises are kept, and promises beside what was really earned."""
    figure = style.new_figure(11.0, 5.0)
    left, right = figure.subplots(1, 2, sharey=True)
    places, coverage = np.arange(len(numbers["name"]))[::-1], numbers["coverage"]
    colours = np.where(np.char.find(numbers["name"], ", by ") >= 0, BLUE, VERMILION)
    error = [200 * standard_error(share, numbers["promise"].shape[1]) for share in numbers["kept"]]
    left.barh(places, 100 * numbers["kept"], color=colours, height=0.62, xerr=error)
    left.axvline(100 * coverage, color=style.INK, linestyle="--", linewidth=1.2)
    left.set(
        xlim=(0, 104),
        xlabel="worlds in which the promise is kept (%)",
        title=f"Orange: promised as it is;\nblue: calibrated to {coverage:.0%} (dashed)",
    )
    left.set_yticks(places, numbers["name"])
    low, middle, high = np.quantile(numbers["actual"], [0.05, 0.5, 0.95], axis=1)
    right.hlines(places, low, high, color="#9a9a9a", linewidth=5, label="true return, 5 to 95% of worlds")
    right.plot(middle, places, "o", color=style.INK, label="its median")
    right.plot(np.median(numbers["promise"], 1), places, "D", color=BLUE, label="promise, median")
    right.set(xlabel="discounted return (reward units)", title="What was promised,\nand what was earned")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure
