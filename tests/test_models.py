"""Inside the training loops of others: a reward model in plain JAX, Equinox and Flax NNX, through `solve`.

The model reads the features of a state and says what its actions pay; a solve makes a policy of that; the loss compares
it with the policy of somebody whose reward nobody knows. Each loop is written as its library wants it.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import robustreg as rr

M, REG = rr.problems.chain(discount=0.9), rr.kl(beta=2.0)
FEATURES = jnp.asarray(np.random.default_rng(0).normal(size=(M.n_states, 4)))
WATCHED = rr.solve(M, REG).policy
DESCENT = optax.chain(optax.clip_by_global_norm(5.0), optax.adam(0.03))
STEPS, HIDDEN = 100, 8


def loss_of(reward: Any, start: Any) -> Any:
    """The Fenchel-Young loss of the policy for a reward `[S, A]`, and the value that the next solve starts from."""
    sol = rr.solve(M.replace(reward=reward), REG, init=start)
    loss = rr.losses.fenchel_young(REG, sol.where_converged(sol.q), WATCHED, weights=1.0)
    return loss, (sol.value, sol.policy)


def repeated(step: Any, model: Any, state: Any) -> Any:
    """The losses of all steps of `model, state, loss, kept = step(model, state, start)`, and the last policy."""
    value, policy = jnp.zeros(M.n_states), None
    losses = []
    for _ in range(STEPS):
        model, state, loss, (value, policy) = step(model, state, value)
        losses.append(float(loss))
    return losses, policy


def plain():
    """Parameters in a dictionary."""
    keys = jax.random.split(jax.random.key(0))
    weights = {
        "in": jax.random.normal(keys[0], (4, HIDDEN)) / 2,
        "out": jax.random.normal(keys[1], (HIDDEN, M.n_actions)) / 3,
    }

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(weights, state, start):
        def loss(weights):
            return loss_of(jnp.tanh(FEATURES @ weights["in"]) @ weights["out"], start)

        (value, kept), slope = jax.value_and_grad(loss, has_aux=True)(weights)
        updates, state = DESCENT.update(slope, state)
        return optax.apply_updates(weights, updates), state, value, kept

    return repeated(step, weights, DESCENT.init(weights))


def equinox():
    """A module whose arrays are filtered."""
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(4, M.n_actions, HIDDEN, 1, key=jax.random.key(0), dtype=jnp.float64)

    @eqx.filter_jit
    @chex.assert_max_traces(n=1)
    def step(model, state, start):
        (loss, kept), slope = eqx.filter_value_and_grad(lambda m: loss_of(jax.vmap(m)(FEATURES), start), has_aux=True)(
            model
        )
        updates, state = DESCENT.update(slope, state, eqx.filter(model, eqx.is_array))
        return eqx.apply_updates(model, updates), state, loss, kept

    return repeated(step, model, DESCENT.init(eqx.filter(model, eqx.is_array)))


def nnx_model():
    """A module that holds its state; the optimiser changes it in place."""
    nnx = pytest.importorskip("flax.nnx")

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(4, HIDDEN, rngs=rngs, param_dtype=jnp.float64)
            self.last = nnx.Linear(HIDDEN, M.n_actions, rngs=rngs, param_dtype=jnp.float64)

        def __call__(self, x):
            return self.last(jnp.tanh(self.first(x)))

    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, DESCENT, wrt=nnx.Param)

    @nnx.jit
    @chex.assert_max_traces(n=1)
    def step(model, optimizer, start):
        (loss, kept), slope = nnx.value_and_grad(lambda m: loss_of(m(FEATURES), start), has_aux=True)(model)
        optimizer.update(model, slope)
        return loss, kept

    # (Both are changed in place.)
    return repeated(lambda m, o, start: (m, o, *step(m, o, start)), model, optimizer)


@pytest.mark.filterwarnings("default")  # those of the libraries, of each other's versions
@pytest.mark.parametrize("loop", [plain, equinox, nnx_model])
def test_a_reward_model_learns_through_the_solve(loop):
    """A hundred steps, traced once; the loss falls to its least, which is the divergence of the policies."""
    chex.clear_trace_counter()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # what Adam and layers count on
        losses, policy = loop()
    assert np.isfinite(losses).all() and losses[-1] < 0.02 * losses[0]
    assert np.abs(np.asarray(policy) - np.asarray(WATCHED)).max() < 0.1
