"""Axes that can be read in two ways are right or refused, both readings named, and every remedy does what it says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import robustreg as rr

RNG = np.random.default_rng(0)
B, A, V, T = 4, 3, 7, 5
BETA = np.linspace(0.5, 2.0, B)
PRIOR, X = RNG.dirichlet(np.ones(A), B), RNG.normal(size=(B, A))
METHODS = ("argmax", "conjugate", "value", "worst_case")


def softmax(x):
    """Plain NumPy."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_lanes_or_states_of_the_same_number():
    """Beta per lane, prior [B, A], values [B, A]: not [B, B, A] in silence, and both remedies are right."""
    for reg in (rr.kl(BETA, PRIOR), rr.alpha(1.5, BETA, PRIOR), rr.kl(BETA, state_scale=np.ones(B))):
        for name in METHODS:
            for x in (softmax(X), softmax(X[0])):
                with pytest.raises(ValueError, match=r"two ways.*values\[\.\.\., None, :\].*state_scale=beta.*prior\["):
                    getattr(reg, name)(x)
        with pytest.raises(ValueError, match="two ways"):
            jax.eval_shape(reg.argmax, X)
    wanted = softmax(np.log(PRIOR) + BETA[:, None] * X)
    rows = rr.kl(1.0, PRIOR, state_scale=BETA).argmax(X)
    np.testing.assert_allclose(rows, wanted, rtol=1e-12)
    lanes = rr.kl(BETA, PRIOR[:, None, :]).argmax(X[:, None, :])
    np.testing.assert_allclose(lanes[:, 0], wanted, rtol=1e-12)
    every = rr.kl(BETA, PRIOR).argmax(X[..., None, :])
    np.testing.assert_allclose(every, softmax(np.log(PRIOR) + BETA[:, None, None] * X[:, None]), rtol=1e-12)


def test_lanes_and_states_of_different_numbers_need_no_remedy():
    found = rr.kl(BETA, PRIOR[:2]).argmax(X)
    np.testing.assert_allclose(found, softmax(np.log(PRIOR[:2]) + BETA[:, None, None] * X[:, None]), rtol=1e-12)
    np.testing.assert_allclose(rr.kl(2.0, PRIOR).argmax(X[0]), softmax(np.log(PRIOR) + 2 * X[0]), rtol=1e-12)


def test_strengths_per_state_of_lanes_are_refused_by_the_factory():
    beta, prior, x = RNG.uniform(1, 2, (B, T)), RNG.dirichlet(np.ones(V), (B, T)), RNG.normal(size=(B, T, V))
    for make in (rr.kl, lambda b, p: rr.alpha(1.5, b, p), jax.jit(lambda b, p: rr.kl(b, p).beta)):
        with pytest.raises(ValueError, match=r"beta \[4, 5\] and prior \[4, 5, 7\].*state_scale=beta.*prior\["):
            make(beta, prior)
    with pytest.raises(ValueError, match=r"alpha \[4, 5\] and prior \[4, 5, 7\]((?!state_scale).)*None, :\]"):
        rr.alpha(beta, 1.0, prior)
    wanted = softmax(np.log(prior) + beta[..., None] * x)
    np.testing.assert_allclose(rr.kl(1.0, prior, state_scale=beta).argmax(x), wanted, rtol=1e-12)
    one = rr.kl(beta, prior[..., None, :]).argmax(x[..., None, :])
    np.testing.assert_allclose(one[:, :, 0], wanted, rtol=1e-12)
    square = rr.kl(np.ones((T, T)), RNG.dirichlet(np.ones(V), (T, T)))
    with pytest.raises(ValueError, match="two ways"):
        square.conjugate(np.zeros((T, T, V)))


def test_leaves_that_do_not_fit_each_other():
    with pytest.raises(ValueError, match=r"do not broadcast: beta \[3\], prior \[2\]"):
        rr.kl(np.ones(3), np.full((2, 5, 4), 1 / 4))
    with pytest.raises(ValueError, match=r"do not broadcast: alpha \[2\], beta \[3\]"):
        rr.alpha(np.ones(2), np.ones(3))
    with pytest.raises(ValueError, match=r"state_scale \[4\] and prior \[5, 4\] are for different numbers of states"):
        rr.kl(1.0, np.full((5, 4), 1 / 4), state_scale=np.ones(4))
    with pytest.raises(ValueError, match=r"values of shape \[2, 4\] do not fit the regulariser's beta \[3\]"):
        rr.kl(np.ones(3)).conjugate(np.zeros((2, 4)))


M, K, S = 2, 3, 5
P, REWARD = RNG.dirichlet(np.ones(S), (S, A)), RNG.random((M, 1, S, A))
BETAS, ROWS = np.geomspace(1, 3, K), RNG.dirichlet(np.ones(A), (K, S))
SETS = {
    "kl": lambda *axes: rr.kl(BETAS.reshape(axes)),
    "alpha": lambda *axes: rr.alpha(np.linspace(-0.5, 1, K).reshape(axes), 2.0, ROWS[0]),
    "prior": lambda *axes: rr.kl(2.0, ROWS.reshape(*axes, S, A)),
    "scale": lambda *axes: rr.kl(1.0, state_scale=(BETAS[:, None] * np.linspace(1, 2, S)).reshape(*axes, S)),
}


@pytest.mark.parametrize("name", SETS)
def test_what_solve_returned_goes_back_in(name):
    """Lanes [M, K] of rewards [M, 1] against K regularisers: theirs are the last of the lanes, as in NumPy."""
    reg = SETS[name](K)
    sol = rr.solve(rr.mdp(P, REWARD, 0.9), reg, tol=1e-10)
    assert sol.policy.shape == (M, K, S, A)
    np.testing.assert_allclose(rr.worst_case(reg, sol.policy), sol.perturbation, atol=1e-9)
    np.testing.assert_allclose(rr.worst_case(reg, log_policy=jnp.log(sol.policy)), sol.perturbation, atol=1e-9)
    np.testing.assert_allclose(rr.slack(reg, sol.perturbation), 0, atol=1e-9)
    np.testing.assert_allclose(reg.conjugate(sol.q), sol.value, atol=1e-9)
    np.testing.assert_allclose(reg.argmax(sol.q), sol.policy, atol=1e-9)
    cost = (sol.policy * (sol.q - sol.value[..., None])).sum(-1)
    np.testing.assert_allclose(reg.value(sol.policy), cost, atol=1e-9)


@pytest.mark.parametrize("name", SETS)
def test_as_many_problems_as_regularisers(name):
    """The first lanes could be theirs as well as the last: refused, and each remedy is one of the two."""
    p = softmax(RNG.normal(size=(K, K, S, A)))
    with pytest.raises(ValueError, match=r"two ways.*\[\*B, \.\.\., A\].*\[3, 1\] for the first.*\[1, 3\] for the sec"):
        rr.worst_case(SETS[name](K), p)
    first, last = rr.worst_case(SETS[name](K, 1), p), rr.worst_case(SETS[name](1, K), p)
    for i in range(K):
        leaf = lambda x: x if x.ndim == 0 or x.shape[0] != K else x[i]  # noqa: B023, E731
        reg = SETS[name](K)
        one = jax.tree.map(leaf, reg) if name != "alpha" else rr.alpha(np.linspace(-0.5, 1, K)[i], 2.0, ROWS[0])
        np.testing.assert_allclose(first[i], rr.worst_case(one, p[i]), rtol=1e-12, atol=1e-13)
        np.testing.assert_allclose(last[:, i], rr.worst_case(one, p[:, i]), rtol=1e-12, atol=1e-13)


def test_one_problem_with_its_axis_is_refused_too():
    """[1, K, S, A] was read as [K, K, S, A]: the axis of 1 broadcast against beta."""
    with pytest.raises(ValueError, match="two ways"):
        rr.kl(BETAS).argmax(np.zeros((1, K, S, A)))
    # Where only the leading axes fit, they are meant, and need not be there in full.
    assert rr.kl(BETAS).argmax(np.zeros((K, 2, S, A))).shape == (K, 2, S, A)
    assert rr.kl(BETAS).argmax(np.zeros((1, 2, S, A))).shape == (K, 2, S, A)
    assert rr.kl(BETAS).argmax(np.zeros(A)).shape == (K, A)
