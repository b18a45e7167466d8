"""Regularisers made of others: of a generator, of parts, of a norm; and none. The same invariants hold for all."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.special import xlogy
from scipy import optimize, special

import robustreg as rr
from robustreg.cli import config, verdicts
from robustreg.regularisers import maximise

S, A = 6, 4


# A user's own regulariser, from public names alone.
class JensenShannon(rr.Separable):
    """The divergence of Jensen and Shannon, of the policy and its prior from their mean."""

    def generator(self, ratio):
        return xlogy(ratio, ratio) - (1 + ratio) * jnp.log((1 + ratio) / 2)


class Power(rr.Separable):
    """`D_alpha`, written by its generator, with the order as a parameter of its own."""

    order: jax.Array

    def generator(self, ratio):
        return (ratio**self.order - 1) / (self.order * (self.order - 1))


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(0)
    prior = rng.dirichlet(np.ones(A), S)
    other = rng.dirichlet(np.ones(A), S)
    return rng, prior, other


def members(prior, other):
    """Every kind of regulariser that there is."""
    return {
        "kl": rr.kl(5.0, prior),
        "alpha": rr.alpha(1.5, 5.0, prior),
        "entropy": rr.entropy(5.0),
        "tsallis": rr.tsallis(2.0, 5.0),
        "own": JensenShannon.create(5.0, prior),
        "sum": rr.kl(5.0, prior) + rr.alpha(2.0, 4.0, prior),
        "two references": rr.alpha(0.5, 5.0, prior) + JensenShannon.create(3.0, other),
        "ball": rr.norm_ball(0.3),
        "ball of 3/2": rr.norm_ball(0.3, 1.5),
        "ball of 1": rr.norm_ball(0.3, 1),
        "ball of infinity": rr.norm_ball(0.3, float("inf")),
        "divergence and ball": rr.kl(5.0, prior) + rr.norm_ball(0.3, 3),
    }


NAMES = list(members(np.ones((S, A)) / A, np.ones((S, A)) / A))


@pytest.mark.parametrize("name", NAMES)
def test_invariants(name, drawn):
    """Duality of one step, robust set and guarantee, minimax value, indifference (and solves that converge)."""
    rng, prior, other = drawn
    reg = members(prior, other)[name]
    q = rng.standard_normal((S, A))
    p = np.array(reg.argmax(q))
    value = np.asarray(reg.conjugate(q))
    assert p.min() >= 0 and np.abs(p.sum(-1) - 1).max() < 1e-12
    # The maximiser attains the conjugate, and no other policy exceeds it.
    assert np.abs((p * q).sum(-1) - reg.value(p) - value).max() < 1e-11
    some = rng.dirichlet(np.ones(A), (50, S))
    costs = np.stack([np.asarray(reg.value(x)) for x in some])
    assert ((some * q).sum(-1) - costs <= value + 1e-12).all()
    # The worst case of any policy: it costs the policy Omega, others no more than theirs, and lies on the boundary.
    for policy, cost in ((some[0], costs[0]), (p, reg.value(p))):
        dr = np.asarray(rr.worst_case(reg, policy))
        size = 1 + np.abs(dr[np.isfinite(dr)]).max()
        assert np.abs((policy * np.where(policy > 0, dr, 0)).sum(-1) - cost).max() < 1e-13 * size
        assert np.abs(rr.slack(reg, dr)).max() < 1e-13 * size
        assert ((some * dr).sum(-1) <= costs + 1e-13 * size).all()
    # What is moved to the boundary is in the set.
    x = rng.standard_normal((S, A))
    inside = x + np.asarray(rr.slack(reg, x))[:, None]
    assert np.abs(rr.slack(reg, inside)).max() < 1e-11
    assert ((some * inside).sum(-1) <= costs + 1e-11).all()
    # The solved value is that of the policy against its worst case, and of the best answer to that reward.
    m = rr.problems.garnet(S, A, 3, discount=0.9, seed=2)
    sol = rr.solve(m, reg).raise_if_failed()
    worst = m.reward - sol.perturbation
    assert np.abs(rr.evaluate(m, sol.policy, reward=worst) - sol.value).max() < 1e-10
    assert np.abs(rr.evaluate(m, sol.policy, reg=reg) - sol.value).max() < 1e-10
    assert np.abs(rr.nominal_optimum(m.replace(reward=worst)) - sol.value).max() < 1e-10
    # Any perturbation in the set leaves the plain optimum at V* or above.
    assert (rr.nominal_optimum(m.replace(reward=m.reward - inside)) >= sol.value - 1e-10).all()
    proof = rr.certify(m, reg, sol)
    proof.raise_if_loose(sol.tol + proof.rounding)
    assert (proof.lower <= sol.value + 1e-12).all() and (sol.value <= proof.upper + 1e-12).all()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("kl", "alpha")])
def test_derivatives(name, drawn):
    """Of conjugate, maximiser and worst case, in values and in the regulariser itself, against differences."""
    rng, prior, other = drawn
    reg, q = members(prior, other)[name], jnp.asarray(rng.standard_normal((S, A)))
    direction, step = jnp.asarray(rng.standard_normal((S, A))), 1e-5
    leaves, tree = jax.tree.flatten(reg)
    moved = [x * rng.uniform(0.1, 1) if x.ndim == 0 else jnp.zeros_like(x) for x in leaves]

    def at(t, u):
        ours = jax.tree.unflatten(tree, [x + u * d for x, d in zip(leaves, moved)])
        bound, x = ours._public(q + t * direction)
        return *maximise(bound, x), ours.worst_case(jax.nn.softmax(q + t * direction))

    # (Values come from the same program as their derivatives.)
    both = jax.jit(lambda t, u, dt, du: jax.jvp(at, (t, u), (dt, du)))
    for dt, du in ((1.0, 0.0), (0.0, 1.0)):
        ahead, behind = (map(np.asarray, both(s * dt, s * du, dt, du)[0]) for s in (step, -step))
        wanted = [(a - b) / (2 * step) for a, b in zip(ahead, behind)]
        for a, b in zip(map(np.asarray, both(0.0, 0.0, dt, du)[1]), wanted, strict=True):
            assert np.abs(a - b).max() < 1e-6 * (1 + np.abs(b).max())


@pytest.mark.parametrize("name", ["own", "divergence and ball"])
def test_derivatives_of_solves(name, drawn):
    """Backwards through a solve, in the reward and in the regulariser."""
    rng, prior, other = drawn
    reg, m = members(prior, other)[name], rr.problems.garnet(S, A, 3, discount=0.9, seed=2)
    direction, step = jnp.asarray(rng.standard_normal((S, A))), 1e-5
    leaves, tree = jax.tree.flatten(reg)
    moved = [x * rng.uniform(0.1, 1) if x.ndim == 0 else jnp.zeros_like(x) for x in leaves]

    def objective(t):
        ours = jax.tree.unflatten(tree, [x + t * d for x, d in zip(leaves, moved)])
        return rr.solve(dataclasses.replace(m, reward=m.reward + t * direction), ours).objective

    both = jax.jit(jax.value_and_grad(objective))
    difference = (both(step)[0] - both(-step)[0]) / (2 * step)
    assert abs(both(0.0)[1] - difference) < 1e-6 * (1 + abs(difference))


def test_a_user_s_own_regulariser(drawn, tmp_path):
    """Solve, adversary, robust set, certificate, gradients (above); here its oracle, sweep, float32, mask and file."""
    rng, prior, _ = drawn
    reg, q = JensenShannon.create(5.0, prior), rng.standard_normal((S, A))
    value = np.asarray(reg.conjugate(q))
    for s in range(S):
        # f' = log(2t/(1+t)), so that p = p0 t with t = e^x/(2 - e^x), x = beta (q - psi).
        def policy(psi, s=s):
            e = np.exp(5.0 * (q[s] - psi))
            return prior[s] * np.where(e < 2, e / np.where(e < 2, 2 - e, 1), 1e9)

        psi = optimize.brentq(
            lambda x: policy(x).sum() - 1, q[s].max() - np.log(2) / 5 + 1e-9, q[s].max() + 5, xtol=1e-14
        )
        p = policy(psi)
        t = p / prior[s]
        cost = (prior[s] * (t * np.log(t) - (1 + t) * np.log((1 + t) / 2))).sum() / 5.0
        assert abs((p * q[s]).sum() - cost - value[s]) < 1e-11
    m = rr.problems.garnet(S, A, 3, discount=0.9, seed=2)
    table = rr.sweep(
        m, reg, grid={"beta": [0.5, 5.0], "discount": [0.5, 0.9]}, outputs=("objective", "regulariser_cost")
    )
    assert float(abs(table["objective"][1, 1] - rr.solve(m, reg).objective)) < 1e-8
    single = jax.tree.map(lambda x: x.astype(np.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, (m, reg))
    sol, truth = rr.solve(*single).raise_if_failed(), np.asarray(rr.solve(m, reg).value)
    assert (np.asarray(sol.lower) <= truth).all() and (truth <= np.asarray(sol.upper)).all()
    masked = prior.copy()
    masked[:, 0] = 0
    masked /= masked.sum(-1, keepdims=True)
    assert float(JensenShannon.create(5.0, masked).argmax(q)[:, 0].max()) == 0
    assert rr.RobustSet(reg).contains(rr.worst_case(reg, prior) - 1e-9).all()
    back = rr.load(rr.save(tmp_path / "own", reg))
    assert type(back) is JensenShannon and float(abs(back.conjugate(q) - value).max()) == 0
    with pytest.raises(TypeError, match="order"):
        Power.create(5.0)


@pytest.mark.parametrize("beta", [1e-3, 1.0, 1e3])
def test_generators_of_known_families(beta, drawn):
    """An alpha divergence by its generator is the one by its own root: also near its prior, and far from it."""
    rng, prior, _ = drawn
    q = rng.standard_normal((S, A))
    for order in (-1.0, 0.5, 1.5, 2.0, 3.0):
        own, known = Power.create(beta, prior, order=order), rr.alpha(order, beta, prior)
        assert np.abs(own.conjugate(q) - known.conjugate(q)).max() < 1e-12 * (1 + 1 / beta)
        assert np.abs(own.argmax(q) - known.argmax(q)).max() < 1e-9
        assert np.allclose(own.worst_case(prior[::-1]), known.worst_case(prior[::-1]), 1e-11, 1e-12 / beta)


def test_sums(drawn):
    """Twice half of a regulariser, chi-PO's in closed form, products of experts, masks, and what is refused."""
    rng, prior, other = drawn
    q = rng.standard_normal((S, A))
    twice = rr.kl(10.0, prior) + rr.kl(10.0, prior)
    assert twice.has_reference and float(abs(twice.beta - 5)) < 1e-12
    assert np.abs(twice.conjugate(q) - rr.kl(5.0, prior).conjugate(q)).max() < 1e-13
    # log t/b1 + (t - 1)/b2 = q - psi is solved by Lambert's function: t = (b2/b1) W((b1/b2) e^{b1 (q - psi + 1/b2)}).
    b1, b2 = 5.0, 4.0
    p = np.asarray((rr.kl(b1, prior) + rr.alpha(2.0, b2, prior)).argmax(q))
    for s in range(S):

        def excess(psi, s=s):
            t = b2 / b1 * special.lambertw(b1 / b2 * np.exp(b1 * (q[s] - psi + 1 / b2))).real
            return (prior[s] * t).sum() - 1, t

        psi = optimize.brentq(lambda x, f=excess: f(x)[0], q[s].min() - 1, q[s].max() + 1, xtol=1e-14)
        assert np.abs(p[s] - prior[s] * excess(psi)[1]).max() < 1e-11
    # KL to two references is KL to their product: policies agree, and values differ by what the two disagree.
    both = rr.kl(5.0, prior) + rr.kl(3.0, other)
    assert not both.has_reference
    product = jax.nn.log_softmax((5.0**-1 * np.log(prior) + 3.0**-1 * np.log(other)) / (1 / 5 + 1 / 3))
    assert np.abs(both.argmax(q) - rr.kl(1 / (1 / 5 + 1 / 3), log_prior=product).argmax(q)).max() < 1e-12
    masked = np.array([[0, 0.5, 0.5, 0]] * S)
    assert (np.asarray((rr.kl(5.0, prior) + rr.kl(3.0, masked)).argmax(q))[:, [0, 3]] == 0).all()
    allowed = np.ones((S, A), bool)
    allowed[:, 2] = False
    assert float(rr.restricted(both, allowed).argmax(q)[:, 2].max()) == 0
    # A sum of one reference is scaled as a whole.
    chi = rr.kl(5.0, prior) + rr.alpha(2.0, 4.0, prior)
    assert np.abs(rr.critical_beta(chi, chi.worst_case(p)) - chi.beta).max() < 1e-9
    with pytest.raises(TypeError, match="reference"):
        rr.critical_beta(both, q)
    with pytest.raises(TypeError, match="one norm ball"):
        _ = rr.norm_ball(0.1) + rr.norm_ball(0.2)
    with pytest.raises(TypeError, match="p = 1"):
        _ = rr.kl(1.0) + rr.norm_ball(0.2, 1)
    with pytest.raises(ValueError, match="do not broadcast"):
        _ = rr.kl(np.ones(2)) + rr.kl(np.ones(3))
    with pytest.raises(TypeError):
        _ = rr.kl(1.0) + 1.0  # type: ignore[operator]


def test_batches_of_sums_and_balls(drawn):
    """Lanes of strengths and radii, per-state ones as well: each is the problem by itself."""
    _, prior, _ = drawn
    m = rr.problems.garnet(S, A, 3, discount=0.9, seed=2)
    betas, radii = np.array([0.5, 5.0, 50.0]), np.array([0.0, 0.1, 1.0])
    scale = np.linspace(0.5, 2, S)
    for make in (
        lambda b, r: rr.norm_ball(r, radius_per_state=scale),
        lambda b, r: rr.kl(b, prior, state_scale=scale) + rr.norm_ball(r, 3),
    ):
        whole = rr.solve(m, make(betas, radii)).raise_if_failed()
        for i in range(3):
            # (Alone, but in as many lanes: one program serves all.)
            alone = rr.solve(m, make(np.full(3, betas[i]), np.full(3, radii[i]))).raise_if_failed()
            assert np.abs(whole.value[i] - alone.value[i]).max() <= float(whole.tol[i] + alone.tol[i])


def test_policies_of_a_sum_with_a_ball_move_as_differences_say(drawn):
    """Where actions are not played as well: the norm knows which."""
    rng, prior, _ = drawn
    q, change = rng.normal(size=(2, S, A))
    for reg, strict in (
        (rr.alpha(2.0, 3.0, prior) + rr.norm_ball(0.3, 2.0), False),
        (rr.alpha(1.5, 3.0) + rr.norm_ball(0.3, 3.0), False),
        (rr.kl(3.0, prior) + rr.norm_ball(0.3, 1.5), True),
    ):
        p, moved = jax.jvp(reg.argmax, (q,), (change,))
        differences = (reg.argmax(q + 1e-6 * change) - reg.argmax(q - 1e-6 * change)) / 2e-6
        assert np.abs(moved - differences).max() < 1e-8
        assert strict or (np.asarray(p) == 0).any()
        radius = jax.jvp(lambda t, reg=reg: _with_radius(reg, t).argmax(q), (0.3,), (1.0,))[1]
        other = (_with_radius(reg, 0.3 + 1e-6).argmax(q) - _with_radius(reg, 0.3 - 1e-6).argmax(q)) / 2e-6
        assert np.abs(radius - other).max() < 1e-8


def _with_radius(reg, radius):
    return reg.parts[0] + dataclasses.replace(reg.parts[1], radius=jnp.asarray(radius))


class Variation(rr.Separable):
    """The 1-norm: flat on both sides of a kink."""

    def generator(self, ratio):
        return jnp.abs(ratio - 1)


class DeadZone(rr.Separable):
    """Nothing near the reference, a square beyond: smooth, and flat where it costs nothing."""

    def generator(self, ratio):
        return jnp.maximum(jnp.abs(ratio - 1) - 0.5, 0) ** 2


@pytest.mark.parametrize("family", [Variation, DeadZone])
def test_generators_with_flat_slopes(family):
    """The policy is worth the conjugate, and none is worth more, also where p jumps from one psi to the next."""
    rng = np.random.default_rng(0)
    q = rng.normal(size=(200, 4))
    q[::3] = np.round(q[::3])
    prior, beta = rng.dirichlet(np.ones(4), 200), 10 ** rng.uniform(-1, 1.5, 200)
    reg = family.create(beta=beta, prior=prior[:, None])
    p, value = np.asarray(reg.argmax(q[:, None]))[:, 0], np.asarray(reg.conjugate(q[:, None]))[:, 0]
    assert p.min() >= 0 and np.abs(p.sum(-1) - 1).max() < 1e-12
    costs = (prior * np.asarray(family.create(beta=1.0).generator(p / prior))).sum(-1) / beta
    assert np.abs((p * q).sum(-1) - costs - value).max() < 1e-9
    some = rng.dirichlet(np.ones(4), (50, 200))
    others = (prior * np.asarray(family.create(beta=1.0).generator(some / prior))).sum(-1) / beta
    assert ((some * q).sum(-1) - others <= value + 1e-12).all()


def test_play_against_sums(drawn):
    """Explicit play needs how far policies move: that of a sum of two halves is that of the whole."""
    _, prior, _ = drawn
    whole, halves = rr.alpha(2.0, 2.0, prior), rr.alpha(2.0, 4.0, prior) + rr.alpha(2.0, 4.0, prior)
    a, b = (reg._public(prior[::-1])[0].curvature(prior[::-1].T) for reg in (whole, halves))
    assert np.abs(a - b).max() < 1e-12
    m = rr.problems.garnet(S, A, 3, discount=0.9, seed=2)
    game = rr.solve_game(m, rr.kl(3.0, prior) + rr.alpha(2.0, 4.0, prior))
    assert (
        game.converged and abs(game.dual - rr.solve(m, rr.kl(3.0, prior) + rr.alpha(2.0, 4.0, prior)).objective) < 1e-9
    )
    with pytest.raises(TypeError, match="kl and alpha alone"):
        rr.UnnormalisedSet(halves).contains(np.zeros((S, A)))


def test_entropies_without_reference(drawn):
    """Tsallis of order 1 is Shannon's; of order q its policies are those of alpha at another strength."""
    rng = drawn[0]
    q = rng.standard_normal((S, A))
    shannon, limit = rr.entropy(5.0), rr.tsallis(1.0, 5.0)
    for a, b in zip((limit.conjugate(q), limit.argmax(q)), (shannon.conjugate(q), shannon.argmax(q))):
        assert np.abs(a - b).max() < 1e-13
    for order in (0.5, 1.5, 2.0, 3.0):
        one = rr.tsallis(order, 5.0)
        assert np.abs(one.argmax(q) - rr.alpha(order, 5.0 * A ** (order - 1) / order).argmax(q)).max() < 1e-9
        p = np.asarray(one.argmax(q))
        assert np.abs(one.value(p) - ((p**order).sum(-1) - 1) / (order - 1) / 5.0).max() < 1e-13
    with pytest.raises(ValueError, match="order"):
        rr.tsallis(-1.0, 5.0)


def test_balls_against_their_definition(drawn):
    """The root by bisection; the policy by its primal value; small and large radii, ties, and float32."""
    rng = drawn[0]
    Q = rng.standard_normal((40, 7))
    Q[:5, 1] = Q[:5].max(1)
    for p in (1, 1.5, 2, 3, 10, np.inf):
        q = {1: np.inf, np.inf: 1}.get(p) or p / (p - 1)
        for radius in (0.0, 1e-6, 0.3, 30.0):
            reg = rr.norm_ball(radius, p)
            x = np.asarray(reg.conjugate(Q))
            policy = np.asarray(reg.argmax(Q))
            primal = (policy * Q).sum(-1) - radius * np.linalg.norm(policy, q, axis=-1)
            assert np.abs(primal - x).max() < 1e-12 * (1 + radius)
            if radius and p < np.inf:
                norm = (np.maximum(Q - x[:, None], 0) ** p).sum(-1) ** (1 / p)
                assert np.abs(norm - radius).max() < 1e-9 * (1 + radius)
            near = rr.norm_ball(np.float32(radius), p).conjugate(Q.astype(np.float32))
            assert np.abs(np.asarray(near) - x).max() < 1e-5 * (1 + radius)
    bad: Any
    for bad in (0.5, "2", np.nan):
        with pytest.raises(ValueError, match="p must be"):
            rr.norm_ball(0.1, bad)
    with pytest.raises(ValueError, match="radius"):
        rr.norm_ball(-1.0)


def test_no_regulariser_at_all(drawn):
    """None is the plain maximum, in solve, certify and sweep, and the limit of what vanishes."""
    m = rr.problems.garnet(S, A, 3, discount=0.9, seed=2)
    sol = rr.solve(m, None).raise_if_failed()
    best = rr.nominal_optimum(m)
    assert np.abs(sol.value - best).max() < 1e-10 and set(np.unique(sol.policy)) == {0.0, 1.0}
    assert np.abs(rr.solve(m, rr.norm_ball(0.0)).value - best).max() < 1e-10
    proof = rr.certify(m, None, sol)
    proof.raise_if_loose(sol.tol + proof.rounding)
    assert np.abs(rr.sweep(m, None, grid={"discount": [0.5, 0.9]})["objective"][1] - sol.objective) < 1e-8
    # A finite horizon that goes on with the optimum is the optimum; the gain is that of a nearly undiscounted problem.
    assert np.abs(rr.solve_horizon(m, None, 3, sol.value).value[0] - sol.value).max() < 1e-10
    slow = rr.solve(m.replace(discount=1 - 1e-6), None)
    assert abs(rr.solve_average(m, None).gain - 1e-6 * slow.objective) < 1e-5


def test_files_and_configurations(drawn, tmp_path):
    """Every member is saved and read back; every kind has a name in a configuration."""
    rng, prior, other = drawn
    q = rng.standard_normal((S, A))
    for i, reg in enumerate(members(prior, other).values()):
        back = rr.load(rr.save(tmp_path / f"{i}", reg))
        assert type(back) is type(reg) and float(abs(back.conjugate(q) - reg.conjugate(q)).max()) == 0
    text = '[problem]\nkind = "ring"\ndiscount = 0.9\n[regulariser]\n'
    for kind, wanted in (
        ('kind = "tsallis"\norder = 2.0\nbeta = 5.0', rr.tsallis(2.0, 5.0)),
        ('kind = "norm_ball"\nradius = 0.3\np = 3.0', rr.norm_ball(0.3, 3)),
        (
            'kind = "sum"\nparts = [{ kind = "kl", beta = 5.0 }, { kind = "alpha", alpha = 2.0, beta = 4.0 }]',
            rr.kl(5.0) + rr.alpha(2.0, 4.0),
        ),
    ):
        path = tmp_path / "job.toml"
        path.write_text(text + kind + "\n")
        made = config.load(path).regulariser
        assert type(made) is type(wanted) and float(abs(made.conjugate(q) - wanted.conjugate(q)).max()) == 0
    assert verdicts.name_of(rr.kl(5.0) + rr.norm_ball(0.3, 3)) == "KL(beta=5) + NormBall(radius=0.3, p=3)"
    for kind, told in (
        ('kind = "sum"\nparts = []', "two tables or more"),
        ('kind = "sum"\nparts = [{ kind = "kl", beta = 5.0 }, { kind = "kl" }]', "needs beta"),
        ('kind = "norm_ball"\nradius = -1.0', "not negative"),
    ):
        path.write_text(text + kind + "\n")
        with pytest.raises(config.ConfigError, match=told):
            config.load(path)


def test_a_penalised_float32_sum_holds_the_truth():
    """Strengths, rewards and priors over many orders of magnitude: the float32 interval holds the float64 value."""
    rng = np.random.default_rng(5)
    lanes = 32
    m = rr.problems.garnet(S, A, 3, discount=0.9, seed=2)
    scale = 10 ** rng.uniform(-4, 4, lanes)
    reward = rng.standard_normal((lanes, S, A)) * scale[:, None, None]
    prior = rng.dirichlet(np.full(A, 0.1), (lanes, S)) + 1e-9
    prior /= prior.sum(-1, keepdims=True)
    b1, b2 = (10 ** rng.uniform(-3, 3, lanes) for _ in range(2))
    for make in (
        lambda c: JensenShannon.create(c(b1), c(prior)) + rr.alpha(c(1.0) * 2, c(b2), c(prior)),
        lambda c: rr.norm_ball(c(1 / b1), 2),
    ):
        low = m.replace(reward=reward)
        low = jax.tree.map(lambda x: jnp.asarray(x, np.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, low)
        exact = jax.tree.map(lambda x: jnp.asarray(x, np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x, low)
        exact = dataclasses.replace(exact, complement=1 - exact.discount)
        reg = make(np.float32)
        wide = jax.tree.map(lambda x: jnp.asarray(x, np.float64), reg)
        sol, truth = rr.solve(low, reg), rr.solve(exact, wide)
        lower, upper = np.asarray(truth.lower), np.asarray(truth.upper)
        held = (np.asarray(sol.lower) <= upper) & (lower <= np.asarray(sol.upper))
        assert held.all(), np.argwhere(~np.asarray(held.all(-1)))
        assert np.isfinite(np.asarray(sol.value)).all()
