"""What a training loop takes out of a problem, and how it comes back."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import robustreg as rr

GRID = rr.problems.slippery_grid(6, 0.9)
REG = rr.alpha(1.5, 3.0, prior=np.array([0.1, 0.2, 0.3, 0.4]))


@pytest.mark.parametrize(
    ("problem", "names"),
    [
        (GRID, ("reward",)),
        (GRID, ("probabilities", "discount", "initial")),
        (rr.mdp([[[0.5, 0.5]], [[0.0, 0.5]]], np.ones((2, 1)), 0.9, termination=[[0.0], [0.5]]), ("termination",)),
        (REG, ("beta", "alpha", "log_prior")),
    ],
)
def test_there_and_back(problem, names):
    numbers, rebuild = rr.trainable(problem, *names)
    assert set(numbers) == set(names)
    chex.assert_trees_all_equal(rebuild(numbers), problem)
    doubled: Any = rebuild({name: 2 * x for name, x in numbers.items()})
    leaves = {**vars(doubled), "probabilities": vars(doubled).get("transitions", doubled)}
    for name in names:
        found = leaves[name].probabilities if name == "probabilities" else leaves[name]
        np.testing.assert_array_equal(found, 2 * numbers[name])


def test_a_discount_takes_its_complement_along():
    single = rr.problems.chain(5, 0.9999, dtype=np.float32)
    numbers, rebuild = rr.trainable(single, "discount")
    chex.assert_trees_all_equal(rebuild(numbers), single)
    numbers, rebuild = rr.trainable(GRID, "discount")
    slope = jax.grad(lambda x: rr.solve(rebuild(x), rr.kl(3.0), tol=1e-10).objective)(numbers)["discount"]
    up, down = (float(rr.solve(GRID.replace(discount=0.9 + d), rr.kl(3.0), tol=1e-11).objective) for d in (1e-5, -1e-5))
    np.testing.assert_allclose(slope, (up - down) / 2e-5, rtol=1e-5)


def test_an_optimiser_changes_what_it_is_given_in_one_trace():
    numbers, rebuild = rr.trainable(GRID, "reward")
    descent = optax.sgd(0.1)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(numbers, state):
        loss = lambda x: (rr.solve(rebuild(x), rr.kl(3.0)).objective - 1.0) ** 2  # noqa: E731
        value, slope = jax.value_and_grad(loss)(numbers)
        update, state = descent.update(slope, state)
        return value, optax.apply_updates(numbers, update), state

    state, values = descent.init(numbers), []
    for _ in range(20):
        value, numbers, state = step(numbers, state)
        values.append(float(value))
    assert values[-1] < 0.1 * values[0]
    learned = rebuild(numbers)
    assert learned.transitions is GRID.transitions and learned.discount is GRID.discount
    assert jnp.any(learned.reward != GRID.reward)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rr.trainable(GRID, "rewards"), "this MDP has no numbers 'rewards'; there are: reward, discount"),
        (lambda: rr.trainable(GRID, "termination" * 2), "no numbers"),
        (lambda: rr.trainable(rr.kl(1.0), "log_prior"), "this KL has no numbers 'log_prior'; there are: beta"),
        (lambda: rr.trainable(GRID), "needs the names"),
        (lambda: rr.trainable(GRID, "reward")[1]({}), "expected numbers for reward"),
    ],
)
def test_what_is_not_there_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
    with pytest.raises(TypeError, match="takes an MDP or a regulariser, got dict"):
        rr.trainable({}, "reward")  # type: ignore[type-var]  # the point
