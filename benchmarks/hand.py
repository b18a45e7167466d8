"""What `benchmarks/gpu.py` compares with: solves as one writes them by hand in JAX, and the truth in float64 NumPy."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import robustreg as rr


class Problem(NamedTuple):
    """A problem and how precisely to solve it.

    Attributes:
        name: of the table.
        mdp: `[M]` leading axes of distinct ones.
        tol: certified.
        betas: smallest and largest, log-spaced over the lanes of each MDP.
    """

    name: str
    mdp: Any
    tol: float
    betas: tuple[float, float] = (0.1, 300.0)

    def one(self, i: int) -> Any:
        """The MDP number i, or the only one."""
        if not self.mdp.batch_shape:
            return self.mdp
        count = self.mdp.batch_shape[0]
        return jax.tree.map(lambda x: x[i] if x.ndim and x.shape[0] == count else x, self.mdp)

    def lanes(self, n: int) -> jax.Array:
        """Strengths of n lanes, `[n]` or `[M, n/M]`."""
        m = self.mdp.batch_shape[0] if self.mdp.batch_shape else 1
        row = np.geomspace(*self.betas, n // m, dtype=self.mdp.dtype)
        return jnp.asarray(np.broadcast_to(row, (m, n // m)) if self.mdp.batch_shape else row)


def expectation(kernel: Any) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """`[S] -> [S, A]` as one writes it."""
    if isinstance(kernel, rr.Dense):
        return lambda p, v: jnp.einsum("sat,t->sa", p, v, precision="highest")
    return lambda p, v: jnp.sum(p * v[kernel.indices], axis=-1)


def vmapped_hand(problem: Problem) -> Callable[..., jax.Array]:
    """Soft value iteration of one lane, vmapped."""
    m, expect = problem.mdp, expectation(problem.mdp.transitions)
    g = float(m.discount)
    stop = problem.tol * (1 - g) / g

    def one(p: jax.Array, reward: jax.Array, beta: jax.Array) -> jax.Array:
        def step(state: Any) -> Any:
            v, _, k = state
            new = jax.nn.logsumexp(beta * (reward + g * expect(p, v)), axis=-1, b=1 / m.n_actions) / beta
            return new, jnp.max(jnp.abs(new - v)), k + 1

        start = (jnp.zeros(m.n_states, m.dtype), jnp.asarray(jnp.inf, m.dtype), 0)
        return lax.while_loop(lambda s: (s[1] > stop) & (s[2] < 100_000), step, start)[0]

    over = jax.vmap(one, (None, None, 0))
    over = jax.vmap(over, (0, 0, 0)) if m.batch_shape else over
    return functools.partial(jax.jit(over), m.transitions.probabilities, m.reward)


def careful_hand(problem: Problem) -> Callable[..., jax.Array]:
    """Relative value iteration of all lanes at once, lanes last, span stop, midpoint."""
    m, kernel = problem.mdp, problem.mdp.transitions
    g, n_actions, own = float(m.discount), m.n_actions, bool(m.batch_shape)
    spec = "msat,mtl->msal" if own else "sat,tl->sal"

    def expect(p: jax.Array, h: jax.Array) -> jax.Array:
        if isinstance(kernel, rr.Dense):
            return jnp.einsum(spec, p, h, precision="highest")
        rows = [p[..., k, None] * h[..., kernel.indices[..., k], :] for k in range(p.shape[-1])]
        return functools.reduce(jnp.add, rows)

    def run(p: jax.Array, reward: jax.Array, beta: jax.Array) -> jax.Array:
        beta = beta[..., None, :]

        def step(state: Any) -> Any:
            h, c, _, k = state
            q = reward[..., None] - (1 - g) * c[..., None, :] + g * expect(p, h)
            best = jnp.max(q, axis=-2)
            total = jnp.sum(jnp.exp(beta[..., None, :] * (q - best[..., None, :])), axis=-2)
            new = best + jnp.log(total / n_actions) / beta
            low, high = ((f(new - h, axis=-2, keepdims=True)) for f in (jnp.min, jnp.max))
            return new, c + g / (1 - g) * 0.5 * (low + high), g / (1 - g) * 0.5 * (high - low), k + 1

        def going(state: Any) -> jax.Array:
            return jnp.any(state[2] > problem.tol) & (state[3] < 100_000)

        zero = jnp.zeros_like(beta)
        start = (jnp.zeros(beta.shape[:-2] + (m.n_states, beta.shape[-1]), m.dtype), zero, zero + jnp.inf, 0)
        h, c, *_ = lax.while_loop(going, step, start)
        return jnp.swapaxes(h + c, -1, -2)

    return functools.partial(jax.jit(run), kernel.probabilities, m.reward)


def truth(mdp: Any, beta: float) -> np.ndarray:
    """The value in float64, `[S]`: Newton's method with a direct solve, in NumPy."""
    kernel, reward, g = mdp.transitions, np.asarray(mdp.reward, float), float(mdp.discount)
    p = np.asarray(kernel.probabilities, float)
    if not isinstance(kernel, rr.Dense):
        full = np.zeros(p.shape[:2] + p.shape[:1])
        states, actions = np.indices(p.shape[:2])
        np.add.at(full, (states[..., None], actions[..., None], np.asarray(kernel.indices)), p)
        p = full
    p, v = p / p.sum(-1, keepdims=True), np.zeros(len(p))
    for _ in range(100):
        q = reward + g * p @ v
        best = q.max(-1, keepdims=True)
        weight = np.exp(beta * (q - best))
        d = best[:, 0] + np.log(weight.mean(-1)) / beta - v
        policy = weight / weight.sum(-1, keepdims=True)
        v = v + np.linalg.solve(np.eye(len(v)) - g * np.einsum("sa,sat->st", policy, p), d)
        if np.abs(d).max() < 1e-9 * (1 - g):
            break
    return v


def inside(problem: Problem, betas: jax.Array, value: jax.Array, bound: Any) -> bool:
    """Whether lanes hold the truth within `bound` of their values, `bound [n]` or a number."""
    n = value.shape[0] if value.ndim == 2 else value.shape[0] * value.shape[1]
    lanes = np.unique(np.linspace(0, n - 1, min(40, max(5, n // 1000))).astype(int))
    lanes = lanes[:: max(1, len(lanes) * problem.mdp.n_states // 4000)]
    flat, bounds = value.reshape(n, -1), np.broadcast_to(np.asarray(bound), value.shape[:-1]).ravel()
    strengths, each = np.asarray(betas).ravel(), n // (problem.mdp.batch_shape or (1,))[0]
    for i in lanes:
        error = np.abs(np.asarray(flat[i], float) - truth(problem.one(i // each), float(strengths[i])))
        if error.max() > bounds[i] * (1 + 1e-6):
            return False
    return True
