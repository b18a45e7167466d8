"""Uncertain transitions: the norms, the operator, the worst model, published distances, what is refused."""

import dataclasses
import itertools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

import robustreg as rr
from robustreg.cli import commands
from robustreg.problems.dense import Dense
from robustreg.problems.successors import BoundSuccessors
from robustreg.solvers import (
    ambiguity,
    bellman,
    bound_problem,
    exact_balls,
    greedy_balls,
    listed_balls,
    plain,
    shared_balls,
)

G = 0.9


@pytest.fixture(scope="module")
def grid():
    """The 5 x 5 grid of [Derman, Geist and Mannor 2021]: rewards at two corners, the first of which ends the walk."""
    P, r = np.zeros((25, 4, 25)), np.zeros((25, 4))
    for s in range(25):
        for a in range(4):
            for b, (di, dj) in enumerate([(-1, 0), (0, 1), (1, 0), (0, -1)]):
                i, j = min(max(s // 5 + di, 0), 4), min(max(s % 5 + dj, 0), 4)
                P[s, a, 5 * i + j] += 0.925 if a == b else 0.025
    P[0], P[0, :, 0], r[0], r[4] = 0, 1, 1, 10
    return rr.mdp(P, r, discount=G, layout="sas")


def test_published_distances(grid):
    """How far each set moves the value of the uniform policy, to two digits; evaluation is swept in NumPy beside it."""
    uniform = np.full((25, 4), 0.25)
    plain = np.asarray(rr.evaluate(grid, uniform))
    assert np.allclose(plain[:5], [9.9914, 6.0223, 6.6772, 12.2271, 28.0361], rtol=2e-3)  # (theirs stops at 1e-3)

    def moved(value):
        return np.linalg.norm(np.asarray(value) - plain)

    assert np.allclose(moved(rr.evaluate(grid, uniform, rr.norm_ball(0.01))), 0.2498, rtol=2e-3)
    for radius, r2, kappa in ((1e-2, 7.573, 6.335), (1e-3, 0.850, 0.6335), (1e-5, 0.0086, 0.006335)):
        for form, wanted in (("r2", r2), ("kappa", kappa)):
            ball = rr.TransitionBall(radius, form=form)
            value = np.asarray(rr.evaluate(grid, uniform, ambiguity=ball))
            assert abs(moved(value) - wanted) < 5e-3 * wanted + 5e-5
            # By sweeps: each action takes off half of the norm, for ||pi||_2 = 1/2.
            P, v = np.asarray(grid.transitions.probabilities), np.zeros(25)
            for _ in range(600):
                x = v if form == "r2" else v - v.mean()
                v = 0.25 * (grid.reward + G * P @ v).sum(1) - G * radius * np.linalg.norm(x) / 2
            assert np.abs(v - value).max() < 1e-9


@pytest.mark.parametrize("p", [1, 1.5, 2, 3, np.inf])
def test_norms_and_their_centres(p):
    """Value and slope against a minimiser that knows nothing of either; kappa is blind to constants."""
    rng = np.random.default_rng(0)
    h, c = rng.standard_normal((9, 5)), rng.standard_normal(5)
    for form in ("r2", "kappa"):
        ball = rr.TransitionBall(0.1, p, "s", form)._laid_out(1, np.float64, 9)
        value, slope = map(np.asarray, ball.worst(jnp.asarray(h), jnp.asarray(c)))
        for i in range(5):
            v, q = h[:, i] + c[i], ball.q
            if form == "kappa":
                found: Any = optimize.minimize_scalar(
                    lambda w, v=v, q=q: np.linalg.norm(v - w, q), bounds=(v.min(), v.max()), options={"xatol": 1e-12}
                )
                assert found.fun - 1e-6 < value[i] < found.fun + 1e-9  # (it finds kinks but roughly)
                assert abs(slope[:, i].sum()) < 1e-9
            else:
                assert abs(value[i] - np.linalg.norm(v, q)) < 1e-12
            # A subgradient of length at most 1 in the dual norm, that attains the value.
            assert np.linalg.norm(slope[:, i], p) <= 1 + 1e-9 and abs(slope[:, i] @ v - value[i]) < 1e-9


CASES: list[tuple[Any, str, str, Any]] = [
    (None, "s", "kappa", 2.0),
    (None, "sa", "r2", 1.0),
    (rr.norm_ball(0.1), "s", "r2", 2.0),
    (rr.norm_ball(0.1, 1.5), "s", "kappa", 1.5),
    (rr.kl(5.0), "sa", "kappa", np.inf),
    (None, "sa", "exact", 1),
    (rr.kl(5.0), "sa", "exact", 2),
    (rr.alpha(2.0, 5.0), "sa", "exact", np.inf),
    (rr.kl(5.0), "sa", "exact", "kl"),
    (rr.kl(5.0), "s", "exact", np.inf),
    (rr.alpha(2.0, 5.0), "s", "exact", 2),
]


@pytest.mark.parametrize("case", [*range(len(CASES) - 1), pytest.param(len(CASES) - 1, marks=pytest.mark.slow)])
def test_the_worst_model_attains_the_robust_value(grid, case: Any):
    """In it the policy is worth the value; the certified interval holds that of plain sweeps; other noise does less."""
    reg, rectangular, form, kind = CASES[case]
    p = cast("Any", kind)
    radius = 0.2 if form == "exact" else 0.004
    ball = rr.TransitionBall(radius, p, rectangular, form)
    sol = rr.solve(grid, reg, ambiguity=ball).raise_if_failed()
    policy, value = np.asarray(sol.policy), np.asarray(sol.value)
    reward, transitions = (np.asarray(x) for x in rr.worst_model(grid, reg, sol, ball))
    paid = (policy * np.where(policy > 0, reward, 0)).sum(-1)
    worst = np.linalg.solve(np.eye(25) - G * np.einsum("sa,sat->st", policy, transitions), paid)
    assert np.abs(worst - value).max() < 1e-8
    assert np.abs(rr.evaluate(grid, policy, reg, ambiguity=ball) - value).max() < 1e-8
    proof = rr.certify(grid, reg, sol, ambiguity=ball)
    proof.raise_if_loose(sol.tol + proof.rounding)
    assert (proof.lower <= value + 1e-12).all() and (value <= proof.upper + 1e-12).all()
    wrong = rr.certify(grid, reg, rr.solve(grid, reg), ambiguity=ball)
    # The nominal solution is not the robust one, and it shows (unless all pairs are charged alike: a constant).
    assert float(wrong.gap.max()) > 1e-4 or (rectangular, form) == ("sa", "kappa")
    assert (wrong.lower <= value + 1e-9).all() and (value <= wrong.upper + 1e-9).all()
    # (Rows that share a radius take their time: fewer sweeps.)
    sweeps = rr.ValueIteration() if (rectangular, form, kind) != ("s", "exact", 2) else rr.Newton(linear="direct")
    swept = rr.solve(grid, reg, sweeps, ambiguity=ball, tol=1e-9).raise_if_failed()
    assert (swept.lower <= sol.upper).all() and (sol.lower <= swept.upper).all()
    # Noise of the same size in other directions hurts no more.
    P, rng = np.asarray(grid.transitions.probabilities), np.random.default_rng(1)
    if form == "exact":
        assert transitions.min() > -1e-12 and np.abs(transitions.sum(-1) - 1).max() < 1e-9
        assert size_of(transitions, P, p, rectangular).max() <= radius * (1 + 1e-6)
    for _ in range(20):
        if form == "exact":  # on the way to other distributions
            other = rng.dirichlet(np.full(25, 0.05), P.shape[:2])
            if p == "kl":  # convex: a part of the way costs no more than that part
                other = np.where(P > 0, other, 0) + 1e-9 * P
                other = other / other.sum(-1, keepdims=True)
                size = np.maximum(size_of(other, P, p, rectangular), radius)
                moved = P + (radius / size).reshape(25, -1, 1) * (other - P)
                model = np.linalg.solve(np.eye(25) - G * np.einsum("sa,sat->st", policy, moved), paid)
                assert (model >= worst - 1e-9).all()
                continue
            other = other - P
        else:
            other = rng.standard_normal(P.shape)
            other -= other.mean(-1, keepdims=True) if form == "kappa" else 0
        size = np.linalg.norm(other.reshape(25, *(-1,) if rectangular == "s" else (4, -1)), cast("Any", p), axis=-1)
        size = size.reshape(25, *(1, 1) if rectangular == "s" else (4, 1))
        moved = P + radius * other / (np.maximum(size, radius) if form == "exact" else size)
        model = np.linalg.solve(np.eye(25) - G * np.einsum("sa,sat->st", policy, moved), paid)
        assert (model >= value - 1e-9).all()


def moved_by_hand(p, b, v, kind):
    """What the worst row takes off `<p, v>`: mass moved state by state."""
    x = p.copy()
    if kind == 1:  # from the highest value on, b/2 altogether, to the lowest
        left, lowest = b / 2, np.argmin(v)
        for s in np.argsort(-v):
            if s != lowest:
                part = min(x[s], left)
                x[s], x[lowest], left = x[s] - part, x[lowest] + part, left - part
    else:  # all that entries can give up, from the lowest value on
        x = np.maximum(p - b, 0)
        left = p.sum() - x.sum()
        for s in np.argsort(v):
            part = min(p[s] + b - x[s], left)
            x[s], left = x[s] + part, left - part
    return (p - x) @ v


@pytest.mark.parametrize(("dtype", "error"), [(np.float64, 1e-12), (np.float32, 1e-5)])
@pytest.mark.parametrize("kind", [1, np.inf])
def test_costs_of_sets_whose_mass_moves_in_the_order_of_values(kind, dtype, error):
    """For any number of states: ties, empty and partial rows, radii of 0 and beyond all mass, rows that lanes share.

    Large radii alone, too, with which all rows stop among the first few states.
    """
    rng = np.random.default_rng(0)
    for n, own, radii in itertools.product((1, 2, 5, 9, 16, 17), (1, 3), ((0, 0.05, 0.3, 1, 3), (0.6, 1, 3))):
        rows = np.moveaxis(rng.dirichlet(np.full(n, 0.4), (2, n, own)), -1, 2)
        rows = (rows * rng.choice([1, 0.5, 0], size=(2, n, 1, own))).astype(dtype)
        radius = rng.choice(radii, size=(2, n, 3)).astype(dtype)
        values = np.round(3 * rng.normal(size=(n, 3)), n % 3).astype(dtype)
        kernel, h = Dense(jnp.asarray(np.moveaxis(rows, (1, 0, 2), (-3, -2, -1)))), jnp.asarray(values)
        ball = greedy_balls.greedy(jnp.asarray(radius), kernel, kind)
        weight, one = jnp.asarray(rng.random((2, n, 3)).astype(dtype)), jnp.ones(3, dtype)
        worst = ball.worst(h, one)
        found = np.asarray(kernel._expect(h) - ball.expected(kernel, h, worst))
        noise = np.asarray(ball.noise(weight, worst))
        pulled = np.asarray(ball.pull(weight, 0.5 * one, worst).entries())
        assert np.abs(pulled + 0.5 * np.einsum("asl,asjl->sjl", weight, noise)).max() <= error
        # The worst rows keep their mass, are no further away than they may be, and attain the cost.
        size = np.abs(noise).sum(2) if kind == 1 else np.abs(noise).max(2)
        assert (rows + noise).min() >= -error and np.abs(noise.sum(2)).max() <= error and (size <= radius + error).all()
        attained = -np.einsum("asjl,jl->asl", noise, values - values.min(0))
        assert np.abs(attained - found).max() <= error * (1 + np.ptp(values))
        for a, s, lane in np.ndindex(2, n, 3):
            want = moved_by_hand(rows[a, s, :, lane % own].astype(float), radius[a, s, lane], values[:, lane], kind)
            assert abs(found[a, s, lane] - want) <= error * (1 + np.ptp(values)), (n, own, a, s, lane)


def of_strength(p, over, s, kind):
    """The row that an adversary of strength s makes of p, and how far that is from p, in extended precision."""
    if kind == 2:
        y = np.sort(p - s * over)[::-1]
        level = (np.cumsum(y) - p.sum()) / np.arange(1, len(p) + 1)
        x = np.maximum(p - s * over - level[np.sum(y > level) - 1], 0)
        return x, np.linalg.norm((x - p).astype(float))
    lost = (p * np.expm1(-s * over)).sum() / p.sum()
    logs = -s * over - (np.log1p(lost) if lost > -0.5 else np.log((p * np.exp(-s * over)).sum() / p.sum()))
    return p * np.exp(logs), (p * (logs * np.exp(logs) - np.expm1(logs))).sum()


@pytest.mark.parametrize(("dtype", "error"), [(np.float64, 1e-13), (np.float32, 5e-6)])
@pytest.mark.parametrize("kind", [2, "kl"])
def test_strength_of_the_adversary_against_bisection(kind, dtype, error):
    """Radii from 1e-10 to beyond all that can move, values of any scale, entries of 1e-12."""
    rng, n, count = np.random.default_rng(0), 5, 80
    rows = rng.dirichlet(np.full(n, 0.3), count)
    rows[::4, 0] = 1e-12 * rng.random(count // 4)
    rows, radius = (rows / rows.sum(1, keepdims=True)).astype(dtype), (10.0 ** rng.uniform(-10, 1, count)).astype(dtype)
    for scale in (1e-3, 1.0, 1e3):
        v = (scale * rng.normal(size=n)).astype(dtype)
        rule = exact_balls._WORST[kind]
        found = np.asarray(jax.jit(rule)(jnp.asarray(rows[None]), jnp.asarray(radius[None]), jnp.asarray(v)))[0]
        for p, b, x in zip(rows, radius, found):
            there = np.ones(n, bool) if kind == 2 else p > 0
            q, over = p[there].astype(np.longdouble), v[there].astype(np.longdouble)
            over = over - over.min()
            low, high = (np.longdouble(10.0**k) / over.max() for k in (-12, 12 if kind == 2 else 9))
            for _ in range(140):
                middle = np.sqrt(low * high)
                low, high = (low, middle) if of_strength(q, over, middle, kind)[1] > b else (middle, high)
            wanted = of_strength(q, over, high, kind)[0]
            assert abs(((wanted - x[there]) * over).sum()) <= error * over.max(), (p, b, v)


@pytest.mark.parametrize(("dtype", "error"), [(np.float64, 1e-12), (np.float32, 1e-5)])
@pytest.mark.parametrize("p", [1, np.inf, "kl"])
def test_lists_of_successors_cost_what_rows_written_out_do(p: Any, dtype, error):
    """With padding and with a successor twice, ties among values, rows that lanes share, radii of 0 and beyond."""
    rng, (actions, lanes) = np.random.default_rng(0), (2, 3)
    for n, width, own, ties in ((1, 3, 1, False), (5, 2, 3, True), (9, 4, 3, False), (9, 12, 1, True)):
        rows = np.moveaxis(rng.dirichlet(np.full(width, 0.5), (actions, n, own)), -1, 0)
        rows = rows * rng.choice([1, 0.5, 0], size=(1, actions, n, own)) * (rng.random((width, 1, 1, 1)) > 0.2)
        rows = BoundSuccessors(jnp.asarray(rng.integers(0, n, (width, actions, n))), jnp.asarray(rows.astype(dtype)))
        radius = jnp.asarray(rng.choice([0, 0.05, 0.3, 1, 3], size=(actions, n, lanes)).astype(dtype))
        h, x = rng.normal(size=(2, n, lanes)).astype(dtype)
        h = jnp.asarray(np.round(h) if ties else h)
        dense = rows._rows(1, dtype)
        policy = jnp.asarray(np.moveaxis(rng.dirichlet(np.ones(actions), (n, lanes)), -1, 0).astype(dtype))

        def all_of_it(radius, rows, h, x, policy):
            plain, none, g = rows._expect(h), jnp.zeros(lanes, dtype), jnp.full(lanes, 0.9, dtype)
            balls: Any = listed_balls.listed(radius, rows, p), ambiguity.written_out(radius, rows, p)
            worst = [ball.worst(h, none) for ball in balls]
            costs = [ball.expected(rows, h, w) - plain for ball, w in zip(balls, worst)]
            pull = balls[0].pull(policy, g, worst[0])
            picked = pull.pick((jnp.asarray([2, 0]),)).entries()
            noise = balls[0].noise(policy, worst[0])
            return *costs, noise, pull.entries(), pull.apply(x), pull.transpose(x), picked

        found = jax.jit(all_of_it)(radius, rows, h, jnp.asarray(x), policy)
        listed, written, noise, entries, ahead, back, picked = map(np.asarray, found)
        assert 0.9 * np.abs(listed - written).max() <= error
        worst = noise + np.asarray(dense)
        assert worst.min() >= -error and np.abs(noise.sum(2)).max() <= error
        assert 0.9 * np.abs(np.einsum("asib,ib->asb", noise, h) - listed).max() <= error
        assert np.abs(np.einsum("asib,asb->sib", noise, -0.9 * np.asarray(policy)) - entries).max() <= error
        assert np.abs(np.einsum("sib,ib->sb", entries, x) - ahead).max() <= error
        assert np.abs(np.einsum("sib,sb->ib", entries, x) - back).max() <= error
        np.testing.assert_array_equal(picked, entries[..., [2, 0]])


@pytest.mark.parametrize("p", [1, np.inf, "kl"])
def test_a_grid_is_solved_as_its_rows_written_out(p: Any):
    """Value, policy's value and derivatives in reward and radius, by lists and by rows."""
    m = rr.problems.slippery_grid(6, 0.9)
    P = np.moveaxis(np.asarray(m.transitions.expect(np.eye(36))), 0, -1)
    whole = rr.mdp(P, m.reward, 0.9, layout="sas", termination=m.termination, initial=m.initial)
    found = []
    for k in (m, whole):

        def objective(reward, radius, k=k):
            ball = rr.TransitionBall(radius, p, "sa", "exact")
            return rr.solve(k.replace(reward=reward), rr.kl(2.0), ambiguity=ball)

        sol = objective(m.reward, 0.05)
        value = rr.evaluate(k, sol.policy, rr.kl(2.0), ambiguity=rr.TransitionBall(0.05, p, "sa", "exact"))
        slopes = jax.grad(lambda r, b, solved=objective: solved(r, b).objective, (0, 1))(m.reward, 0.05)
        found.append((sol.value, value, *slopes))
        assert sol.converged and np.abs(value - sol.value).max() < 1e-10
    for listed, written in zip(*found):
        np.testing.assert_allclose(listed, written, rtol=1e-8, atol=1e-10)
    bound = bound_problem.bind(m._with_sparsity(), rr.kl(2.0), ambiguity=rr.TransitionBall(0.05, p, "sa", "exact"))
    assert isinstance(bound.ball, listed_balls.ListedBall)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "p", "rectangular"),
    [
        *(("exact", p, "sa") for p in (1, 2, np.inf, "kl")),
        *(("kappa", p, "sa") for p in (1, 2, 3, np.inf)),
        ("kappa", 2, "s"),
        ("r2", 2, "s"),
        ("exact", 2, "s"),
    ],
)
def test_second_derivatives(form, p: Any, rectangular):
    """In reward and radius at once, against differences of the first, where rows are lists and where they are not."""
    m = rr.problems.garnet(6, 3, 3, 0.8)
    P = np.moveaxis(np.asarray(m.transitions.expect(np.eye(6))), 0, -1)
    moved, radius, e = np.random.default_rng(0).normal(size=(6, 3)), 0.05 if form == "exact" else 0.01, 1e-5
    for k in (m, rr.mdp(P, m.reward, 0.8, layout="sas")):

        def objective(t, k=k):
            ball = rr.TransitionBall(radius * (1 + t), p, rectangular, form)
            return rr.solve(k.replace(reward=k.reward + t * moved), rr.kl(2.0), ambiguity=ball).objective

        slope = jax.jit(jax.grad(objective))
        second = float(jax.jit(lambda t, slope=slope: jax.jvp(slope, (t,), (1.0,))[1])(0.0))
        assert abs(second - (slope(e) - slope(-e)) / (2 * e)) < 1e-5 * (1 + abs(second))
        if form != "exact":  # (one kind of rows is like the other)
            break


@pytest.mark.parametrize("p", [1, 1.5, 2, 3, np.inf])
def test_one_step_against_convex_programs(p):
    """Both rectangularities, noise with and without a sum of 0, beside a ball of rewards: the best policy by a solver.

    The program is over the policy, charged for the norm of V which a minimiser of its own has found.
    """
    rng, n, k, b, a = np.random.default_rng(2), 6, 4, 0.01, 0.2
    P, r, v = rng.dirichlet(np.ones(n), (n, k)), rng.standard_normal((n, k)), 3 * rng.standard_normal(n)
    m, q = rr.mdp(P, r, discount=G), p / (p - 1) if 1 < p < np.inf else (np.inf if p == 1 else 1)
    for form, rectangular in itertools.product(("r2", "kappa"), ("s", "sa")):
        size = np.linalg.norm(v, q)
        if form == "kappa":
            away = optimize.minimize_scalar(lambda w: np.linalg.norm(v - w, q), bounds=(v.min(), v.max()))
            size = min([np.linalg.norm(v - w, q) for w in (*v, (v.max() + v.min()) / 2)] + [cast("Any", away).fun])
        reg = rr.norm_ball(a, p)
        problem = bound_problem.bind(m, reg, ambiguity=rr.TransitionBall(b, p, rectangular, form))
        found = np.asarray(bellman.backup(problem, jnp.asarray(v), jnp.zeros(()))[0])
        radius = a + (G * b * size if rectangular == "s" else 0)
        for s in range(n):
            worth = r[s] + G * P[s] @ v - (G * b * size if rectangular == "sa" else 0)
            if p == 1:  # the norm is the largest entry: one more unknown
                above = np.c_[np.eye(k), -np.ones(k)]
                best = -optimize.linprog(np.r_[-worth, radius], above, np.zeros(k), np.r_[np.ones(k), 0][None], [1]).fun
            elif p == np.inf:
                best = worth.max() - radius
            else:
                best = -optimize.minimize(
                    lambda pi, w=worth, c=radius: c * (pi**q).sum() ** (1 / q) - pi @ w,
                    np.full(k, 1 / k),
                    bounds=[(1e-14, 1)] * k,
                    constraints=[{"type": "eq", "fun": lambda pi: pi.sum() - 1}],
                    options={"ftol": 1e-13, "maxiter": 500},
                ).fun
            assert abs(found[s] - best) < 1e-6


def size_of(x: Any, p: Any, kind: Any, rectangular: str = "sa") -> Any:
    """By how much rows, or all rows of a state, differ: in a norm, or the relative entropy."""
    if kind == "kl":
        each = np.where(x > 0, x * np.log(np.where(x > 0, x, 1) / np.where(p > 0, p, 1)), 0).sum(-1)
        return each if rectangular == "sa" else each.sum(-1)
    return np.linalg.norm((x - p).reshape(*x.shape[: -1 if rectangular == "sa" else -2], -1), kind, axis=-1)


@pytest.mark.parametrize(("dtype", "error"), [(np.float64, 1e-11), (np.float32, 1e-5)])
@pytest.mark.parametrize("kind", [2, "kl"])
def test_rows_that_share_a_radius(kind, dtype, error):
    """One step between what its policy is sure of, by bisection in extended precision, and what its noise leaves.

    With rows of one successor, of mass .9, and with entries of 0; radii of 0 and beyond all that can move.
    """
    rng, n, k = np.random.default_rng(0), 6, 3
    P = rng.dirichlet(np.full(n, 0.6), (n, k))
    P[0, 0], P[1, 1] = np.eye(n)[2], np.where(P[1, 1] < 0.1, 0, P[1, 1])
    P /= P.sum(-1, keepdims=True)
    P[2] *= 0.9
    P, r, v = P.astype(dtype), rng.normal(size=(n, k)).astype(dtype), (3 * rng.normal(size=n)).astype(dtype)
    m = rr.mdp(
        P,
        r,
        discount=dtype(G),
        layout="sas",
        termination=(np.where(np.arange(n) == 2, 0.1, 0)[:, None] + 0 * r).astype(dtype),
    )
    over, wide = (v - v.min()).astype(np.longdouble), P.astype(np.longdouble)
    lowest = np.where((P > 0) | (kind == 2), v, np.inf).min(-1, keepdims=True)
    above = (v - lowest).astype(np.longdouble) * ((P > 0) | (kind == 2))

    @jax.jit
    def step(reg, radius):
        problem = bound_problem.bind(m, reg, ambiguity=rr.TransitionBall(radius, kind, "s", "exact"))
        h, c = jnp.asarray(v), jnp.zeros((), dtype)
        th, policy, _ = bellman.backup(problem, h, c)
        assert problem.ball is not None
        return th, policy, problem.ball.noise(policy, bellman.worst_transitions(problem, h, c))

    for reg, radius in itertools.product((None, rr.kl(2.0), rr.kl(50.0), rr.alpha(2.0, 3.0)), (0, 0.03, 0.3, 4.0)):
        bound: Any = plain.regulariser_or_none(m, reg and jax.tree.map(lambda x: x.astype(dtype), reg))
        th, policy, noise = (np.asarray(x, float) for x in step(bound, jnp.asarray(radius, dtype)))
        policy, noise = policy.T, np.moveaxis(noise, 0, 1)
        x = P + noise
        assert x.min() > -error and np.abs(noise.sum(-1)).max() < error
        assert (size_of(x, P, kind, "s") <= radius * (1 + 20 * error) + error**2).all()
        paid = np.zeros(n) if reg is None else np.asarray(reg.value(policy))
        q = r + G * P @ v
        for s in range(n):
            # What the policy is sure of: the noise of one strength for all actions, at which the radius is spent.
            spent, low, high = np.inf, np.longdouble(1e-15), np.longdouble(1e5 if kind == 2 else 1e18)
            for _ in range(120):
                middle = np.sqrt(low * high)
                rows = [of_strength(wide[s, a], policy[s, a] * above[s, a], middle, kind) for a in range(k)]
                spent = np.linalg.norm([size for _, size in rows], 2 if kind == 2 else 1)
                low, high = (low, middle) if spent > radius else (middle, high)
            lost = sum(policy[s, a] * ((wide[s, a] - row) * over).sum() for a, (row, _) in enumerate(rows))
            sure = (policy[s] * q[s]).sum() - G * lost - paid[s]
            assert abs(th[s] - sure) < 10 * error
        # (Where the radius is not spent, actions that are not played are left alone.)
        left = r + G * x @ v
        best = left.max(-1) if reg is None else np.asarray(reg.conjugate(left))
        assert radius == 4.0 or np.abs(best - th).max() < 10 * error


@pytest.mark.parametrize("reg", [None, rr.kl(1.0)])
@pytest.mark.parametrize("kind", [2, "kl"])
def test_how_often_a_backup_looks_at_rows_that_share_a_radius(grid, reg, kind, monkeypatch):
    """Three searches, one in the other: 47 to 146 looks; 1,480 (p = 2) where each of them began anew."""
    looked, noise = [], shared_balls._noise

    def counted(*arguments):
        jax.debug.callback(lambda: looked.append(1))
        return noise(*arguments)

    monkeypatch.setattr(shared_balls, "_noise", counted)
    problem = bound_problem.bind(
        grid, plain.regulariser_or_none(grid, reg), ambiguity=rr.TransitionBall(0.01, kind, form="exact")
    )
    h = jnp.asarray(np.random.default_rng(0).normal(size=25))
    jax.block_until_ready(bellman.backup(problem, h, jnp.zeros(())))
    jax.effects_barrier()
    assert len(looked) < 250


def kernel_of(rows):
    """A bound kernel of rows `[A, S, S]`."""
    return Dense(jnp.swapaxes(jnp.asarray(rows), 0, 1))


@pytest.mark.parametrize("p", [1, 2, np.inf, "kl"])
def test_worst_rows(p: Any):
    """Against a linear program (p = 1, infinity) and SLSQP; derivatives in rows, values and radius by differences.

    A row of mass .9 as well, as of a pair that may end the episode, and one with an entry of 0.
    """
    rng, n, e = np.random.default_rng(0), 6, 1e-6
    for radius in (0.02, 0.3, 1.2):
        rows, h = rng.dirichlet(np.full(n, 0.5), (1, n)), rng.standard_normal(n)
        rows[0, 1] *= 0.9
        rows[0, 2] = np.where(np.arange(n) == 3, 0, rows[0, 2]) / np.delete(rows[0, 2], 3).sum()
        sums = rows[0].sum(-1)
        ball, v = ambiguity.written_out(jnp.full((1, 1), radius), kernel_of(rows), p), jnp.asarray(h)
        worst: Any = ball.worst(v, jnp.zeros(()))
        noise: Any = ball.noise(jnp.ones((1, n)), worst)
        x, least = rows[0] + np.asarray(noise)[0], np.asarray(ball.expected(kernel_of(rows), v, worst))[0]
        assert x.min() >= 0 and np.abs(x.sum(-1) - sums).max() < 1e-12
        assert size_of(x, rows[0], p).max() <= radius * (1 + 1e-9)
        for row, found, mass in zip(rows[0], least, sums):
            if p == 1:
                one, zero = np.eye(n), np.zeros(n)
                sides = np.block([[one, -one], [-one, -one], [np.zeros((1, n)), np.ones((1, n))]])
                costs, total = np.r_[h, zero], np.r_[np.ones(n), zero][None]
                best = optimize.linprog(costs, sides, np.r_[row, -row, radius], total, [mass]).fun
                assert abs(found - best) < 1e-12
            elif p == np.inf:
                bounds = [(max(y - radius, 0), y + radius) for y in row]
                assert abs(found - optimize.linprog(h, A_eq=np.ones((1, n)), b_eq=[mass], bounds=bounds).fun) < 1e-12
            else:
                limit = {2: radius**2, "kl": radius}[p]

                def room(y, row=row, limit=limit):
                    return limit - (size_of(np.maximum(y, 0), row, "kl") if p == "kl" else ((y - row) ** 2).sum())

                whole = {"type": "eq", "fun": lambda y, mass=mass: y.sum() - mass}
                options: Any = {"constraints": [whole, {"type": "ineq", "fun": room}], "options": {"ftol": 1e-12}}
                bounds = [(0, 1 if p == 2 or y > 0 else 0) for y in row]
                best = optimize.minimize(lambda y, h=h: y @ h, row, bounds=bounds, **options)
                assert abs(found - best.fun) < 1e-6  # (the ball is theirs to 1e-7)
        direction, dh = rows * (rng.standard_normal(rows.shape)), rng.standard_normal(n)

        def at(t, rows=rows, direction=direction, h=h, dh=dh, radius=radius):
            moved, v = jnp.asarray(rows) + t * direction, jnp.asarray(h) + t * dh
            kernel = kernel_of(moved)
            ball = ambiguity.written_out(jnp.full((1, 1), radius + 0.3 * t), kernel, p)
            worst: Any = ball.worst(v, jnp.zeros(()))
            return jnp.sum(ball.expected(kernel, v, worst))

        assert abs(jax.grad(at)(0.0) - (at(e) - at(-e)) / (2 * e)) < 1e-6


def test_gradients_lanes_and_float32(grid):
    """Backwards in reward, discount and radius; lanes of radii; a float32 interval holds the float64 value."""
    direction = jnp.arange(100.0).reshape(25, 4) / 100
    reg = rr.norm_ball(0.1)

    def objective(t):
        ball = rr.TransitionBall(0.004 + 0.01 * t, 2, "s", "kappa")
        m = grid.replace(reward=grid.reward + t * direction, discount=G + 0.01 * t)
        return rr.solve(m, reg, ambiguity=ball).objective

    def exact(t):
        ball = rr.TransitionBall(0.1 + 0.1 * t, 1, "sa", "exact")
        return rr.solve(grid.replace(reward=grid.reward + t * direction), reg, ambiguity=ball).objective

    step = 1e-5
    assert abs(jax.grad(exact)(0.0) - (exact(step) - exact(-step)) / (2 * step)) < 1e-6
    assert abs(jax.grad(objective)(0.0) - (objective(step) - objective(-step)) / (2 * step)) < 1e-6
    radii = np.array([0.0, 0.002, 0.004])
    lanes = rr.solve(grid, reg, ambiguity=rr.TransitionBall(radii))
    assert (np.diff(lanes.objective) < 0).all()
    assert np.abs(lanes.value[0] - rr.solve(grid, reg).value).max() < 1e-9
    low = jax.tree.map(lambda x: x.astype(np.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, grid)
    single = rr.solve(low, rr.norm_ball(np.float32(0.1)), ambiguity=rr.TransitionBall(np.float32(0.004)))
    truth = np.asarray(lanes.value[2])
    assert (np.asarray(single.lower) <= truth).all() and (truth <= np.asarray(single.upper)).all()


def test_per_state_and_per_pair_radii(grid, tmp_path):
    """A radius of 0 where it matters is no radius; scales multiply; a set is saved and read back."""
    half = rr.solve(grid, None, ambiguity=rr.TransitionBall(0.004)).value
    scaled = rr.solve(grid, None, ambiguity=rr.TransitionBall(0.008, per_state=np.full(25, 0.5))).value
    assert np.abs(half - scaled).max() < 1e-10
    kept = ambiguity.checked(rr.TransitionBall(0.008, 1.5, "sa", "r2", per_state=np.full(25, 0.5)), grid)
    back = rr.load(rr.save(tmp_path / "ball", kept))
    assert (back.p, back.rectangular, back.form) == (1.5, "sa", "r2") and float(back.radius) == 0.008
    none = rr.TransitionBall(0.008, rectangular="sa", per_pair=np.zeros((25, 4)))
    assert np.abs(rr.solve(grid, None, ambiguity=none).value - rr.nominal_optimum(grid)).max() < 1e-9


def test_a_sweep_over_radii(grid, tmp_path):
    """Cells are single solves; without any radius the problem is the plain one; a folder is resumed, not mixed up."""
    ball = rr.TransitionBall(0.0, 1, "sa", "exact")
    radii = np.array([0.0, 0.1, 0.3])
    asked: Any = {"outputs": ("objective", "worst_case_return", "regulariser_cost"), "ambiguity": ball, "out": tmp_path}
    table = rr.sweep(grid, rr.kl(5.0), {"ambiguity": radii}, **asked)
    each = rr.solve(grid, rr.kl(5.0), ambiguity=dataclasses.replace(ball, radius=radii))
    assert np.abs(table["objective"] - each.objective).max() < 1e-9 and (np.diff(table["objective"]) < -1e-3).all()
    assert np.abs(table["worst_case_return"] - table["objective"]).max() < 1e-8
    assert abs(table["objective"][0] - rr.solve(grid, rr.kl(5.0)).objective) < 1e-9
    again = rr.sweep(grid, rr.kl(5.0), {"ambiguity": radii}, resume=True, part=None, **asked)
    assert np.array_equal(again["objective"], table["objective"])
    other: Any = asked | {"ambiguity": dataclasses.replace(ball, p=2.0)}
    with pytest.raises(ValueError, match="another sweep"):
        rr.sweep(grid, rr.kl(5.0), {"ambiguity": radii}, resume=True, **other)
    with pytest.raises(ValueError, match="unknown leaf 'ambiguity'"):
        rr.sweep(grid, rr.kl(5.0), {"ambiguity": radii})
    with pytest.raises(ValueError, match="largest radius"):
        rr.sweep(grid, rr.kl(5.0), {"ambiguity": radii}, ambiguity=rr.TransitionBall(0.0))
    with pytest.raises(ValueError, match="no batch axes"):
        rr.sweep(grid, rr.kl(5.0), {"beta": radii + 1}, ambiguity=dataclasses.replace(ball, radius=radii))


CONFIG = """
[problem]
kind = "chain"
[regulariser]
kind = "none"
[ambiguity]
radius = 0.1
p = inf
rectangular = "sa"
"""


def test_the_command_line(tmp_path, capsys):
    """An [ambiguity] table is solved for, shown, certified from the file, and refused where it is none."""
    path = tmp_path / "robust.toml"
    path.write_text(CONFIG.replace("p = inf", "p = 1").replace('"sa"', '"sa"\nform = "exact"'))
    assert commands.main(["solve", str(path), "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "TransitionBall(radius=0.1, p=1, sa, exact)" in shown
    ball = rr.TransitionBall(0.1, 1, "sa", "exact")
    wanted = rr.solve(rr.problems.chain(), None, ambiguity=ball).objective
    assert np.isclose(rr.load(tmp_path / "result.npz").objective, wanted, rtol=1e-6)
    assert commands.main(["certify", str(tmp_path / "result.npz")]) == 0
    shown = capsys.readouterr().out
    assert "TransitionBall" in shown and "holds" in shown
    path.write_text(CONFIG.replace("p = inf", 'p = "kl"').replace('"sa"', '"sa"\nform = "exact"'))
    assert commands.main(["solve", str(path)]) == 0
    assert "TransitionBall(radius=0.1, p=kl, sa, exact)" in capsys.readouterr().out
    np.savez(tmp_path / "reward.npz", reward=np.zeros((1, 1)))
    assert commands.main(["certify", str(path), "--deployed", str(tmp_path / "reward.npz")]) == 2
    assert "take the table out" in capsys.readouterr().err
    for old, new, told in (
        ("p = inf", 'p = "2"', "from 1 to infinity or \"kl\", got '2'"),
        ("p = inf", "p = 0.5", "[ambiguity] the p of a TransitionBall"),
        ('"sa"', '"state"', "[ambiguity] rectangular"),
        ("radius = 0.1", "", "needs radius"),
        ("radius = 0.1", "radius = 5.0", "[ambiguity] a radius of 5 is too large"),
        ("radius = 0.1", "radius = [0.001, 0.0015]", "batch of sets"),
        ("radius = 0.1", 'radius = 0.1\nkind = "ball"', "unknown key 'kind'"),
        ("radius = 0.1", "radius = 0.1\nsize = 1", "unknown key 'size'"),
        ('[ambiguity]\nradius = 0.1\np = inf\nrectangular = "sa"', "ambiguity = 0.1", "expected a table"),
    ):
        text = CONFIG.replace(old, new)
        assert text != CONFIG
        # A key without a table comes before the tables.
        path.write_text("ambiguity = 0.1\n" + CONFIG.split("[ambiguity]")[0] if new == "ambiguity = 0.1" else text)
        assert commands.main(["solve", str(path)]) == 2
        assert told in capsys.readouterr().err


def test_what_is_refused(grid):
    """Radii without a contraction, with the largest that passes; names and numbers out of range."""
    most = (1 / G - 1) / 5
    with pytest.raises(ValueError, match=f"largest radius that passes is {most:.6g}"):
        rr.solve(grid, None, ambiguity=rr.TransitionBall(0.1))
    assert rr.solve(grid, None, ambiguity=rr.TransitionBall(0.999 * most)).converged
    traced = jax.jit(lambda r: rr.solve(grid, None, ambiguity=rr.TransitionBall(r)).status)
    assert int(traced(0.1)) == rr.Status.NONFINITE_INPUT
    for ball, told in (
        (rr.TransitionBall(-1.0), "not negative"),
        (rr.TransitionBall(0.1, 0.5), "p of a TransitionBall"),
        (rr.TransitionBall(0.1, 2, "state"), "rectangular"),
        (rr.TransitionBall(0.1, 2, "s", "ball"), "form"),
        (rr.TransitionBall(0.1, 1, "s", "exact"), "p = 1 needs"),
        (rr.TransitionBall(0.1, 3, "sa", "exact"), "exact"),
        (rr.TransitionBall(0.1, "kl", "sa"), "no norm"),
        (rr.TransitionBall(0.1, "l1"), "or .kl."),
        (rr.TransitionBall(0.1, per_state=np.ones(3)), "per_state"),
        (rr.TransitionBall(0.1, per_pair=np.ones((25, 4))), "sa"),
    ):
        with pytest.raises(ValueError, match=told):
            rr.solve(grid, None, ambiguity=ball)
    with pytest.raises(TypeError, match="TransitionBall"):
        rr.solve(grid, None, ambiguity=0.1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="another p"):
        rr.solve(grid, rr.kl(1.0), ambiguity=rr.TransitionBall(0.001, 1))
    assert isinstance(ambiguity.checked(rr.TransitionBall(0.1 / 25), grid), rr.TransitionBall)
