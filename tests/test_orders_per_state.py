"""A divergence of another order in every state: each state is that of its own regulariser."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import robustreg as rr

S, A = 5, 4
ORDERS = np.array([-1.0, 0.5, 1.0, 1.7, 3.0])
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(S, A))
SCALE = np.array([1.0, 2.0, 0.5, 1.0, 3.0])


@pytest.fixture(scope="module")
def regs():
    """Together, and one for each state."""
    whole = rr.alpha(1.0, 2.0, log_prior=LOGITS, state_scale=SCALE, alpha_per_state=ORDERS - 1)
    return whole, [rr.alpha(o, 2.0 * x, log_prior=p) for o, x, p in zip(ORDERS, SCALE, LOGITS)]


def test_one_step(regs):
    """Values, policies, worst cases and slacks of each state are those of its own order; several lanes at once."""
    whole, each = regs
    q, policy = RNG.normal(size=(3, S, A)), RNG.dirichlet(np.ones(A), (3, S))
    for name, x in (("conjugate", q), ("argmax", q), ("log_policy", q), ("value", policy), ("worst_case", policy)):
        found = np.asarray(getattr(whole, name)(x))
        wanted = np.stack([np.asarray(getattr(reg, name)(x[:, s])) for s, reg in enumerate(each)], 1)
        np.testing.assert_allclose(found, wanted, rtol=1e-10, atol=1e-12, err_msg=name)
    dr = 0.1 * q
    wanted = np.stack([np.asarray(rr.slack(reg, dr[:, s])) for s, reg in enumerate(each)], 1)
    np.testing.assert_allclose(rr.slack(whole, dr), wanted, rtol=1e-9, atol=1e-12)
    wanted = np.stack([np.asarray(rr.critical_beta(reg, dr[:, s])) for s, reg in enumerate(each)], 1) / SCALE
    np.testing.assert_allclose(rr.critical_beta(whole, dr), wanted, rtol=1e-6)


def test_solve_adversary_certificate_gradient_and_file(regs, tmp_path):
    """The solution is a fixed point state by state; it is certified, attacked, played, differentiated and kept."""
    whole, each = regs
    m = rr.problems.garnet(S, A, 3, discount=0.9)
    sol = rr.solve(m, whole).raise_if_failed()
    q = np.asarray(sol.q)
    backed = [float(reg.conjugate(q[s])) for s, reg in enumerate(each)]
    np.testing.assert_allclose(sol.value, backed, rtol=1e-9)
    assert np.asarray(sol.policy)[4].min() == 0 < np.asarray(sol.policy)[1].min()
    proof = rr.certify(m, whole, sol)
    proof.raise_if_loose(sol.tol + proof.rounding)
    dr = np.asarray(sol.perturbation)
    attacked = rr.evaluate(m, sol.policy, reward=m.reward - dr)
    np.testing.assert_allclose(attacked, sol.value, rtol=1e-8)
    game = rr.solve_game(m, whole, tol=1e-6, steps=400).raise_if_failed()
    assert game.primal - 1e-9 <= sol.objective <= game.dual + 1e-9
    single = jax.tree.map(lambda x: x.astype(np.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, (m, whole))
    low = rr.solve(*single)
    truth = np.asarray(sol.value)
    assert (np.asarray(low.lower) <= truth).all() and (truth <= np.asarray(low.upper)).all()

    def objective(t):
        moved: Any = rr.alpha(1.0, 2.0, log_prior=LOGITS, state_scale=SCALE, alpha_per_state=ORDERS - 1 + t)
        return rr.solve(m, moved).objective

    step = 1e-5
    assert abs(jax.grad(objective)(0.0) - (objective(step) - objective(-step)) / (2 * step)) < 1e-6
    back = rr.load(rr.save(tmp_path / "reg", whole))
    assert np.array_equal(back.alpha_per_state, whole.alpha_per_state)
    table = rr.sweep(m, whole, {"beta": [1.0, 2.0], "alpha": [1.0, 1.2]})
    assert abs(table["objective"][1, 0] - sol.objective) < 1e-8


def test_what_is_refused():
    wrong: Any = (
        ({"alpha_per_state": 1.0}, "needs a state axis"),
        ({"alpha_per_state": [1.0, np.nan]}, r"alpha_per_state\[1\]"),
        ({"alpha_per_state": np.ones(3), "state_scale": np.ones(4)}, "different numbers of states"),
    )
    for arguments, told in wrong:
        with pytest.raises(ValueError, match=told):
            rr.alpha(1.0, 2.0, **arguments)
    m, reg = rr.problems.garnet(S, A, 3, discount=0.9), rr.alpha(1.0, 2.0, alpha_per_state=np.ones(3))
    with pytest.raises(ValueError, match="another number of states"):
        rr.solve(m, reg)
    with pytest.raises(ValueError, match="alpha_per_state"):
        rr.stack([(m, rr.alpha(1.0, 2.0, alpha_per_state=ORDERS))] * 2)
    with pytest.raises(ValueError, match="alpha_per_state"):
        rr.solve_occupancy(m, rr.alpha(1.0, 2.0, alpha_per_state=ORDERS), np.full((S, A), 1 / (S * A)))


def test_a_negative_strength_is_the_problem_turned_round():
    """The soft minimum, of one step and of many, from its definition; a negative beta says how to get it."""
    beta, q = 1.5, RNG.normal(size=(S, A))
    reg, weights = rr.kl(beta), np.exp(-beta * q)
    np.testing.assert_allclose(-reg.conjugate(-q), np.log(weights.mean(-1)) / -beta, rtol=1e-12)
    np.testing.assert_allclose(reg.argmax(-q), weights / weights.sum(-1, keepdims=True), rtol=1e-12)
    m = rr.problems.garnet(S, A, 3, discount=0.9)
    P, r, v = np.asarray(m.transitions.expect(np.eye(S))), np.asarray(m.reward), np.zeros(S)
    for _ in range(400):
        v = np.log(np.exp(-beta * (r + 0.9 * np.einsum("tsa,t->sa", P, v))).mean(-1)) / -beta
    sol = rr.solve(m.replace(reward=-m.reward), reg)
    assert (-np.asarray(sol.upper) <= v + 1e-12).all() and (v <= -np.asarray(sol.lower) + 1e-12).all()
    np.testing.assert_allclose(-np.asarray(sol.value), v, rtol=1e-9)
    with pytest.raises(ValueError, match=r"soft minimum: `-reg.conjugate\(-q\)`"):
        rr.kl(-1.0)
    with pytest.raises(ValueError) as error:
        rr.kl(0.0)
    assert "minimum" not in str(error.value)
