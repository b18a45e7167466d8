"""Small decision problems for the tests, all of one shape so that they share compiled programs and stack into batches.

Every probability, reward and prior is a short binary fraction: rows sum to one exactly, and the float32 copy of a
problem is the same problem. There are 12 states and 4 actions, never as many states as actions.
"""

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import oracle
from numpy.typing import DTypeLike

import robustreg as rr

STATES, ACTIONS = 12, 4
KINDS = ("dense", "successors", "matrix-free")
# Enough to visit every branch: both removable points, both sides of 1/2, 1 and 2, and the stiff ends.
ALPHAS = (-10.0, -3.0, -1.0, -0.5, 0.0, 0.5, 0.9, 1.0, 1.1, 1.5, 2.0, 2.5, 3.0, 5.0, 10.0)


@dataclass(frozen=True)
class Case:
    """A problem in NumPy: P [*B,S,A,S], reward [*B,S,A], termination [*B,S,A], initial [*B,S], prior [*B,S,A]."""

    name: str
    P: np.ndarray
    reward: np.ndarray
    termination: np.ndarray
    initial: np.ndarray
    prior: np.ndarray

    def transitions(self, kind="dense", dtype: DTypeLike = np.float64):
        """The same transitions as one of the three kinds."""
        if kind == "dense":
            return dense(self.P, dtype)
        if kind == "successors":
            return successors(self.P, dtype)
        return rr.MatrixFree(expect, push, n_states=STATES, n_actions=ACTIONS, parameters=self.P.astype(dtype))

    def mdp(self, discount, kind="dense", dtype: DTypeLike = np.float64):
        """The problem as an ``rr.MDP``; the discount stays in double precision until the factory has seen it."""
        return rr.mdp(
            self.transitions(kind, dtype),
            self.reward.astype(dtype),
            discount,
            initial=self.initial.astype(dtype),
            termination=self.termination.astype(dtype),
        )

    @property
    def allowed(self):
        """Actions the prior does not mask."""
        return self.prior > 0

    def lane(self, *index):
        """One problem of a stack."""
        pick = {name: getattr(self, name)[index] for name in ("P", "reward", "termination", "initial", "prior")}
        return replace(self, **pick)


def dense(P, dtype: DTypeLike = np.float64):
    """``rr.Dense`` of a NumPy array."""
    return rr.Dense(jnp.asarray(P.astype(dtype)))


def expect(v, P):
    """Matrix-free expectation, [S] -> [S,A]; module level, so that every case shares one compiled program."""
    return P @ v


def push(mu, P):
    """Its transpose, [S,A] -> [S]."""
    return mu.reshape(-1) @ P.reshape(-1, P.shape[-1])


def successors(P, dtype: DTypeLike = np.float64, width=None):
    """Successor lists of P [*B,S,A,S]; the indices are shared by a batch, so they hold the union of its successors."""
    live = (P > 0).reshape(-1, *P.shape[-3:]).any(0)
    width = width or int(live.sum(-1).max())
    order = np.argsort(~live, axis=-1, kind="stable")[..., :width]
    indices = np.where(np.take_along_axis(live, order, -1), order, 0)
    probabilities = np.where(
        np.take_along_axis(live, order, -1),
        np.take_along_axis(P, np.broadcast_to(order, P.shape[:-1] + (width,)), -1),
        0,
    )
    return rr.Successors(jnp.asarray(indices, np.int32), jnp.asarray(probabilities.astype(dtype)))


def written_out(rows):
    """A kernel as an array `[S, A, S]`."""
    if isinstance(rows, rr.Dense):
        return np.asarray(rows.probabilities)
    p, lists = np.asarray(rows.probabilities), np.asarray(rows.indices)
    P, (s, a, _) = np.zeros((*p.shape[:2], len(p))), np.indices(p.shape)
    np.add.at(P, (s, a, lists), p)
    return P


def stack(cases):
    """Many cases as one, along a new leading axis."""
    return Case(
        "stack",
        *(np.stack([getattr(c, name) for c in cases]) for name in ("P", "reward", "termination", "initial", "prior")),
    )


def random_row(rng, size, total=4096):
    """Positive binary fractions that sum to one exactly."""
    cuts = np.sort(rng.choice(np.arange(1, total), size - 1, replace=False))
    return np.diff(np.concatenate([[0], cuts, [total]])) / total


def random_reward(rng, shape):
    """Binary fractions in [-1, 1]."""
    return rng.integers(-1024, 1025, shape) / 1024


def garnet(seed=0, branching=3, states=STATES):
    """Random transitions [S,A,S]: ``branching`` successors per state and action."""
    rng = np.random.default_rng(seed)
    P = np.zeros((states, ACTIONS, states))
    for s, a in np.ndindex(states, ACTIONS):
        P[s, a, rng.choice(states, branching, replace=False)] = random_row(rng, branching)
    return P


def make(name, P, reward, termination=None, initial=None, prior=None):
    """Fill in the defaults: no termination, a skewed initial distribution, the uniform prior."""
    if termination is None:
        termination = np.zeros(P.shape[:2])
    if initial is None:
        initial = np.array([5, 4] + [1] * 6 + [0] * 3 + [1]) / 16
    if prior is None:
        prior = np.full(P.shape[:2], 1 / ACTIONS)
    return Case(name, P * (1 - termination)[..., None], reward, termination, initial, prior)


def garnet_case(seed=0):
    """Random problem with random skewed priors."""
    rng = np.random.default_rng(100 + seed)
    prior = np.stack([random_row(rng, ACTIONS, 64) for _ in range(STATES)])
    return make("garnet", garnet(seed), random_reward(rng, (STATES, ACTIONS)), prior=prior)


def ring():
    """Left, right, stay, jump across; a quarter of the moves slips. Periodic but for the slip."""
    P = np.zeros((STATES, ACTIONS, STATES))
    for s in range(STATES):
        for a, step in enumerate((-1, 1, 0, STATES // 2)):
            P[s, a, (s + step) % STATES] += 0.75
            P[s, a, (s + 1) % STATES] += 0.25
    reward = np.zeros((STATES, ACTIONS))
    reward[3], reward[:, 3] = 1.0, -0.25
    return make("ring", P, reward)


def grid():
    """A 3 x 4 slippery grid: absorbing goal in a corner, +1 on entry, water in the second row."""
    P = np.zeros((STATES, ACTIONS, STATES))
    moves = ((-1, 0), (0, 1), (1, 0), (0, -1))
    for s in range(STATES - 1):
        row, column = divmod(s, 4)
        for a in range(ACTIONS):
            for turn, chance in ((0, 0.75), (1, 0.125), (-1, 0.125)):
                down, right = moves[(a + turn) % 4]
                P[s, a, 4 * np.clip(row + down, 0, 2) + np.clip(column + right, 0, 3)] += chance
    P[-1, :, -1] = 1.0
    reward = np.full((STATES, ACTIONS), -1 / 128)
    reward[4:8] -= 0.125
    reward += P[..., -1]
    reward[-1] = 0.0
    return make("grid", P, reward)


def absorbing():
    """Garnet with an absorbing state of reward 0, one of reward 1/2 in every action, and states nobody reaches."""
    P = garnet(3)
    P[:, :, 7] += P[:, :, 8:].sum(-1)
    P[:, :, 8:] = 0.0
    reward = random_reward(np.random.default_rng(4), (STATES, ACTIONS))
    for s, gain in ((0, 0.0), (5, 0.5)):
        P[s], reward[s] = 0.0, gain
        P[s, :, s] = 1.0
    return make("absorbing", P, reward, initial=np.eye(STATES)[2])


def terminating():
    """Garnet whose episodes end: sometimes, never or surely, by state and action."""
    rng = np.random.default_rng(5)
    ends = rng.choice([0.0, 0.0, 0.25, 1.0], (STATES, ACTIONS))
    return make("terminating", garnet(6), random_reward(rng, (STATES, ACTIONS)), termination=ends)


def masked():
    """Zero priors, states with a single action, and a very small prior; rewards at masked actions look attractive."""
    rng = np.random.default_rng(7)
    prior = np.stack([random_row(rng, ACTIONS, 64) for _ in range(STATES)])
    prior[::2, 1] += prior[::2, 0]
    prior[::2, 0] = 0.0
    prior[4:6] = np.eye(ACTIONS)[1]
    prior[7] = [2.0**-20, 0.5, 0.25, 0.25 - 2.0**-20]
    reward = random_reward(rng, (STATES, ACTIONS))
    reward = np.where(prior > 0, reward, 64.0)
    return make("masked", garnet(8), reward, prior=prior)


def ties():
    """Actions that do not matter: the policy is the prior and nothing is worth perturbing."""
    P = np.broadcast_to(garnet(9)[:, :1], (STATES, ACTIONS, STATES)).copy()
    reward = np.repeat(random_reward(np.random.default_rng(10), (STATES, 1)), ACTIONS, axis=1)
    return make("ties", P, reward)


def linked():
    """Two halves joined by moves of probability 1/1024: slow for everything that only averages."""
    P = np.zeros((STATES, ACTIONS, STATES))
    half = STATES // 2
    P[:half, :, :half], P[half:, :, half:] = garnet(11, states=half), garnet(12, states=half)
    link = 2.0**-10
    P = (1 - link) * P
    P[:half, :, half] += link
    P[half:, :, 0] += link
    reward = random_reward(np.random.default_rng(13), (STATES, ACTIONS))
    reward[half:] += 0.5
    return make("linked", P, reward)


def bandits():
    """Twelve independent bandits: every state returns to itself. One of them has six-action spacing."""
    P = np.zeros((STATES, ACTIONS, STATES))
    P[np.arange(STATES), :, np.arange(STATES)] = 1.0
    reward = random_reward(np.random.default_rng(14), (STATES, ACTIONS))
    reward[0] = [0.0, 0.25, 0.5, 0.75]
    return make("bandits", P, reward)


def all_cases():
    """Every named case, in a fixed order."""
    return [garnet_case(), ring(), grid(), absorbing(), terminating(), masked(), ties(), linked(), bandits()]


def lanes(**values):
    """Cartesian product of the given lists, one flat array each: ``lanes(alpha=..., beta=...)["alpha"]`` is [L]."""
    mesh = np.meshgrid(*values.values(), indexing="ij")
    return {name: grid_.reshape(-1) for name, grid_ in zip(values, mesh, strict=True)}


# Strengths and discounts that go together in the suite below: weak and strong, quick and slow, nearly undiscounted.
PAIRS = ((1e-3, 0.9), (0.3, 0.99), (10.0, 0.99), (1e4, 0.999), (1.0, 0.9999), (3.0, 1 - 1e-6))
# Stacks are [9, 1] and lanes come in chunks of this many, so that one compiled program serves most tests.
STACK, LANES = 9, 24


@functools.cache
def suite():
    """Every case under every alpha and every pair, with the oracle's answer, computed once.

    Returns:
      the stacked cases (leading axis M = 9), lanes alpha, beta, discount ([L] each, L = 90), value [M,L,S],
      policy [M,L,S,A].
    """
    cases = stack(all_cases())
    index = lanes(alpha=ALPHAS, pair=np.arange(len(PAIRS)))
    beta, discount = np.array(PAIRS)[index["pair"]].T
    index = {"alpha": index["alpha"], "beta": beta, "discount": discount}
    return cases, index, *truth(cases, index)


def truth(cases, index):
    """The oracle's value [M,L,S] and policy [M,L,S,A] of stacked cases in the given lanes."""
    return oracle.solve(
        cases.P[:, None], cases.reward[:, None], index["discount"], index["alpha"], index["beta"], cases.prior[:, None]
    )


def select(index, keep):
    """Some of the lanes."""
    return {name: values[keep] for name, values in index.items()}


def problem(cases, index, kind="dense", dtype: DTypeLike = np.float64, state_scale=None):
    """Stacked cases [M,1] against lanes [L], as an MDP and a regulariser."""
    P = cases.P[:, None].astype(dtype)
    m = rr.mdp(
        dense(P, dtype) if kind == "dense" else successors(P, dtype, STATES),
        cases.reward[:, None].astype(dtype),
        index["discount"].tolist(),
        initial=cases.initial[:, None].astype(dtype),
        termination=cases.termination[:, None].astype(dtype),
    )
    alpha, beta = (np.asarray(index[name], dtype) for name in ("alpha", "beta"))
    return m, rr.alpha(alpha=alpha, beta=beta, prior=cases.prior[:, None].astype(dtype), state_scale=state_scale)


def solve(cases, index, solver=None, *, kind="dense", tol=None, init=None, max_steps=None):
    """``rr.solve`` of stacked cases in any number of lanes, in chunks of one shape; fields are [M,L,...].

    tol and init broadcast to [L] and [M,L,S].
    """
    count, width = len(index["alpha"]), len(cases.P)
    rows = np.arange(STACK) % width
    chunks = []
    for start in range(0, count, LANES):
        pick = np.arange(start, start + LANES) % count
        m, reg = problem(stack([cases.lane(i) for i in rows]), select(index, pick), kind)
        goal = None if tol is None else np.broadcast_to(tol, count)[pick].astype(float)
        first = None if init is None else np.broadcast_to(init, (width, count, STATES))[rows][:, pick]
        chunks.append(rr.solve(m, reg, solver, tol=goal, init=first, max_steps=max_steps))
    return jax.tree.map(lambda *x: np.concatenate(x, axis=1)[:width, :count], *chunks)


def size(reward, beta, value):
    """Largest summand of a backup per problem, [*B]: what rounding errors are proportional to."""
    return 1 + np.abs(reward).max((-1, -2)) + np.abs(value).max(-1) + 1 / np.asarray(beta)
