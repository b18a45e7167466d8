"""Random problems for `honesty.py`, which the working precision holds exactly.

Whatever is drawn is a number of float32 (or float64) before anybody sees it: rows of P are multiples of 2^-12 that sum
to one (or to `1 - termination`) exactly, `1 - discount` is a multiple of 2^-20, and everything else is rounded first.
Library and reference are then asked about the same problem to the last bit, except that a prior which sums to 1 only to
rounding (one of thirds, in float32) is divided by its sum in the reference.
"""

from dataclasses import dataclass

import numpy as np
import reference
from reference import LD

GRAIN = 4096  # probabilities are multiples of 1/GRAIN
KINDS = (
    "sparse",
    "dense",
    "permutation",
    "map",
    "cycle with exits",
    "absorbing chain",
    "two-cycles",
    "skew walk",
    "nearly a map",
    "nearly decomposable",
)


@dataclass(frozen=True)
class Draw:
    """A batch of problems in the working precision, and what they were drawn as.

    Attributes:
        exact: the same problems in extended precision.
        P, reward, termination, initial, beta, alpha, prior: arrays in the working precision; discount in float64.
        policy: a random policy `[B, S, A]`, multiples of 1/GRAIN, some deterministic; 0 where the prior is.
        kind: index into `KINDS`, `[B]`.
        scale: of the rewards, `[B]`.
    """

    exact: reference.Problem
    P: np.ndarray
    reward: np.ndarray
    termination: np.ndarray
    discount: np.ndarray
    initial: np.ndarray
    beta: np.ndarray
    alpha: np.ndarray
    prior: np.ndarray
    policy: np.ndarray
    kind: np.ndarray
    scale: np.ndarray

    def describe(self, lane: int) -> str:
        """One lane in words."""
        return (
            f"{KINDS[self.kind[lane]]}, discount {self.discount[lane]:.6g}, alpha {self.alpha[lane]:.6g}, "
            f"beta {self.beta[lane]:.3g}, rewards of {self.scale[lane]:.1g}, "
            f"smallest prior {self.prior[lane].min():.1g}, ends {bool(self.termination[lane].any())}"
        )


def draw(rng: np.random.Generator, lanes: int, states: int, actions: int, dtype: str, kl: bool, ends: bool) -> Draw:
    """Draw a batch of problems.

    Args:
        rng: where they come from.
        lanes, states, actions: B, S, A.
        dtype: the working precision.
        kl: alpha = 1 in every lane.
        ends: whether episodes end in most of the lanes.
    """
    kind = rng.integers(len(KINDS), size=lanes)
    counts, exits = _rows(rng, kind, states, actions), np.zeros((lanes, states, actions), int)
    if ends:
        counts, exits = _exits(rng, counts)
    prior = _prior(rng, lanes, states, actions).astype(dtype)
    scale = 10 ** rng.uniform(-6, 6, lanes)
    numbers = {
        "P": (counts / GRAIN).astype(dtype),
        "termination": (exits / GRAIN).astype(dtype),
        "reward": _reward(rng, lanes, states, actions, scale, prior).astype(dtype),
        "initial": _shares(rng, lanes, states, rng.random(lanes) < 0.3).astype(dtype),
        "discount": 1 - np.round(_distance(rng, lanes) * 2**20) / 2**20,
        "beta": (10 ** rng.uniform(-6, 6, lanes)).astype(dtype),
        "alpha": np.ones(lanes, dtype) if kl else _order(rng, lanes).astype(dtype),
        "prior": prior,
    }
    exact = {name: x.astype(LD) for name, x in numbers.items()}
    exact["prior"] = exact["prior"] / exact["prior"].sum(-1, keepdims=True)
    exact["reward"] = np.where(prior > 0, exact["reward"], 0)
    policy = _policy(rng, prior).astype(dtype)
    return Draw(exact=reference.Problem(**exact), **numbers, policy=policy, kind=kind, scale=scale)


def _distance(rng: np.random.Generator, lanes: int) -> np.ndarray:
    """`1 - discount`: log-uniform from 1e-4 to 1, some at either end."""
    some = 10 ** rng.uniform(-4, 0, lanes)
    return rng.choice([0, 1, 2], lanes, p=[0.05, 0.85, 0.1]).choose([np.ones(lanes), some, np.full(lanes, 1e-4)])


def _order(rng: np.random.Generator, lanes: int) -> np.ndarray:
    """alpha: uniform in [-5, 5], a share exactly at or beside the special ones."""
    special = rng.choice([0.0, 0.5, 1.0, 2.0], lanes)
    beside = special + rng.choice([-1, 1], lanes) * 10 ** rng.uniform(-7, -2, lanes)
    some = rng.uniform(-5, 5, lanes)
    return rng.choice(3, lanes, p=[0.7, 0.2, 0.1]).choose([some, special, beside])


def _reward(
    rng: np.random.Generator, lanes: int, states: int, actions: int, scale: np.ndarray, prior: np.ndarray
) -> np.ndarray:
    """Normal, of one sign, rare, or tied; forbidden actions tempt."""
    x = rng.standard_normal((lanes, states, actions))
    rare = np.where(rng.random(x.shape) < 0.15, x, 0)
    x = rng.integers(4, size=(lanes, 1, 1)).choose([x, np.abs(x), rare, np.round(x)])
    x = np.where((prior == 0) & (rng.random((lanes, 1, 1)) < 0.5), 100.0, x)
    return x * scale[:, None, None]


def _shares(rng: np.random.Generator, lanes: int, parts: int, single: np.ndarray) -> np.ndarray:
    """Distributions over `parts` in multiples of 1/GRAIN, all on one part where `single`."""
    raw = rng.exponential(size=(lanes, parts)) ** 2 + 1e-9
    raw = np.where(single[:, None], np.arange(parts) == rng.integers(parts, size=(lanes, 1)), raw)
    counts = np.floor(GRAIN * raw / raw.sum(-1, keepdims=True)).astype(int)
    counts[np.arange(lanes), counts.argmax(-1)] += GRAIN - counts.sum(-1)
    return counts / GRAIN


def _prior(rng: np.random.Generator, lanes: int, states: int, actions: int) -> np.ndarray:
    """Uniform or random, with entries down to 1e-12 in a third of the lanes and forbidden actions in a third."""
    rows = lanes * states
    random = _shares(rng, rows, actions, np.zeros(rows, bool)).reshape(lanes, states, actions)
    uniform = rng.random((lanes, 1, 1)) < 0.4
    p = np.where(uniform, 1 / actions, np.maximum(random, 1 / GRAIN))
    tiny = (rng.random((lanes, 1, 1)) < 0.33) & (rng.random(p.shape) < 0.4)
    p = np.where(tiny, 2.0 ** -rng.integers(12, 41, p.shape), p)
    p = np.where((rng.random((lanes, 1, 1)) < 0.33) & (rng.random(p.shape) < 0.3), 0, p)
    # The largest entry takes what is left, so that the sum is exact in double precision.
    changed = ~np.isclose(p, 1 / actions).all(-1)
    rest = np.eye(actions, dtype=bool)[p.argmax(-1)]
    return np.where(rest & changed[..., None], 1 - np.where(rest, 0, p).sum(-1, keepdims=True), p)


def _policy(rng: np.random.Generator, prior: np.ndarray) -> np.ndarray:
    """Random over the allowed actions, deterministic in a third of the lanes."""
    lanes, states, actions = prior.shape
    single = np.repeat(rng.random(lanes) < 0.33, states)
    p = _shares(rng, lanes * states, actions, single).reshape(prior.shape)
    p = np.where(prior > 0, p, 0)
    rest = np.eye(actions, dtype=bool)[np.where(prior > 0, p, -1).argmax(-1)]
    return np.where(rest, 1 - np.where(rest, 0, p).sum(-1, keepdims=True), p)


def _rows(rng: np.random.Generator, kind: np.ndarray, states: int, actions: int) -> np.ndarray:
    """Transitions as counts `[B, S, A, S]`, each row summing to GRAIN: mostly one successor, the rest elsewhere."""
    lanes, shape = len(kind), (len(kind), states, actions)
    here = np.arange(states)[None, :, None]
    anywhere = rng.integers(states, size=shape)
    shuffled = np.argsort(rng.random((lanes, actions, states)), -1).swapaxes(1, 2)
    ahead, half = (here + 1) % states, np.maximum(states // 2, 1)
    within = np.where(here < half, anywhere % half, half + anywhere % np.maximum(states - half, 1)) % states
    ends_here = np.minimum(here + 1, states - 1)
    exit_ = np.where(rng.random(shape) < 0.2, states - 1, np.where(here == states - 1, here, ahead))
    twin = np.minimum(here ^ 1, states - 1)
    targets = [anywhere, anywhere, shuffled, anywhere, exit_, ends_here, twin, ahead, anywhere, within]
    main = kind[:, None, None].choose([np.broadcast_to(x, shape) for x in targets])
    # Share of the main successor: all, all but a power of two, or little.
    near = GRAIN - 2 ** rng.integers(0, 11, size=shape)
    weights = [np.zeros(shape, int)] * 2 + [np.full(shape, GRAIN)] * 5 + [near] * 3
    weight = kind[:, None, None].choose(weights)
    back = np.broadcast_to((here - 1) % states, shape)
    counts = np.zeros((*shape, states), int)
    place = (*np.indices(shape),)
    np.add.at(counts, (*place, main), weight)
    rest = GRAIN - weight
    for last in (False, False, True):
        part = rest if last else (rest * rng.random(shape)).astype(int)
        walk = (kind == KINDS.index("skew walk"))[:, None, None]
        np.add.at(counts, (*place, np.where(walk, back, rng.integers(states, size=shape))), part)
        rest = rest - part
    dense = kind == KINDS.index("dense")
    rows = int(dense.sum()) * states * actions
    if rows:
        filled = _shares(rng, rows, states, np.zeros(rows, bool)) * GRAIN
        counts[dense] = filled.astype(int).reshape((-1, *counts.shape[1:]))
    return counts


def _exits(rng: np.random.Generator, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probability taken from the largest entry of rows, and how much: nowhere, at some pairs, everywhere a little."""
    largest, place = counts.max(-1), counts.argmax(-1)
    style = rng.integers(4, size=(len(counts), 1, 1))
    some = np.where(rng.random(largest.shape) < 0.2, rng.integers(1, GRAIN + 1, largest.shape), 0)
    whole = np.where(rng.random(largest.shape) < 0.2, GRAIN, 0)
    little = rng.integers(1, 64, largest.shape)
    exits = np.minimum(style.choose([np.zeros_like(some), some, whole, little]), largest)
    taken = counts.copy()
    np.put_along_axis(taken, place[..., None], (largest - exits)[..., None], -1)
    return taken, exits
