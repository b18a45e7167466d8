"""Decision problems to try things on: a bandit, grid worlds, a chain, a ring, random Garnets.

Every generator computes in double precision and returns an `MDP`. `dtype` casts the tables before they enter
the MDP (None leaves the choice to JAX's own setting); the discount stays in double precision either way.

**Grid worlds** are drawn as text, one string per row:

    .   floor            #   wall: nobody enters it, moves into it stay
    ~   water            G   goal: absorbing, no reward once there
    S   start            states are cells in row-major order, walls included

A move goes as intended, or with probability `slip` each to its left or right; moves off the grid stay.
Under a regulariser that costs nothing at its prior (`kl`, `alpha`), an absorbing cell without reward has value 0, like
the end of an episode; `entropy` has no prior and pays for every step that is played, there too.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from robustreg._core import checks
from robustreg.problems.dense import Dense
from robustreg.problems.mdps import MDP, mdp
from robustreg.problems.successors import Successors

MOVES = ((-1, 0), (0, 1), (1, 0), (0, -1))
"""Actions of a grid world as (rows, columns): up, right, down, left, in turning order."""

CELLS = {"S": "start", "G": "goal", "~": "water", "#": "wall", ".": "floor"}


def bandit(reward: Any = (1.1, 0.8, 0.7, 0.5, 0.2, -0.3), discount: Any = 0.0, *, dtype: Any = None) -> MDP:
    """One state, one decision, as often as the discount says.

    Args:
        reward: of each action, `[A]`.
        discount: `[*B]`; 0 is a single decision.
        dtype: precision of the tables; None follows JAX.

    Returns:
        An MDP with S = 1.
    """
    r = np.asarray(reward, np.float64)
    if r.ndim != 1 or r.size == 0:
        raise ValueError(f"reward of a bandit has shape {r.shape}; expected [A], one number per action")
    return _assemble(Dense, (np.ones((1, r.size, 1)),), r[None], discount, np.ones(1), dtype)


def grid_world(
    cells: Sequence[str],
    discount: Any = 0.99,
    *,
    slip: float = 0.1,
    step: float = -0.01,
    water: float = -0.1,
    goal: float = 1.0,
    dtype: Any = None,
) -> MDP:
    """Make a grid world from a drawing in text (see the module's docstring).

    Args:
        cells: one string per row, all of one length, of the letters `. ~ # S G`.
        discount: `[*B]`.
        slip: probability of moving to the left of the intended direction, and again to its right.
        step: reward of a step from any cell but water.
        water: reward of a step from water.
        goal: reward added on entering a goal.
        dtype: precision of the tables; None follows JAX.

    Returns:
        An MDP with `grid` set. It starts on the cells `S`, or without any on a random floor or water cell.

    Raises:
        ValueError: if the drawing is not a rectangle of the letters above, or `2 slip` is no probability.
    """
    letters = _letters(cells)
    _check_probability("slip", slip, 0.5)  # on either side
    for name, value in (("step", step), ("water", water), ("goal", goal)):
        _check_number(name, value)
    flat = letters.ravel()
    target = _targets(letters)
    outcomes = np.stack([target, np.roll(target, -1, axis=1), np.roll(target, 1, axis=1)], axis=-1)
    chances = np.broadcast_to([1 - 2 * slip, slip, slip], outcomes.shape)
    base = np.where(flat == "~", water, step)[:, None]
    reward = base + goal * (chances * (flat[outcomes] == "G")).sum(-1)
    reward[(flat == "G") | (flat == "#")] = 0.0
    packed = _packed(outcomes, chances)
    return _assemble(Successors, packed, reward, discount, _start(flat), dtype, letters.shape)


def grid_marks(cells: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """States of the remarkable cells of a drawing by name (start, goal, water, wall), those present."""
    flat = _letters(cells).ravel()
    found = {CELLS[letter]: np.flatnonzero(flat == letter) for letter in "SG~#"}
    return {name: tuple(int(s) for s in states) for name, states in found.items() if states.size}


def slippery_cells(size: int = 32, *, water_share: float = 0.2, seed: int = 0) -> tuple[str, ...]:
    """Draw the cells of `slippery_grid`: start and goal in opposite corners, water scattered between."""
    _check_size("size", size, 2)
    _check_probability("water_share", water_share)
    rng = _generator(seed)
    letters = np.full(size * size, ".")
    places = 1 + rng.permutation(size * size - 2)
    letters[places[: round(water_share * size * size)]] = "~"
    letters[0], letters[-1] = "S", "G"
    return tuple("".join(row) for row in letters.reshape(size, size))


def slippery_grid(
    size: int = 32, discount: Any = 0.99, *, water_share: float = 0.2, seed: int = 0, dtype: Any = None
) -> MDP:
    """Make a slippery square grid to measure on: it mixes slowly, where Garnets mix fast.

    The intended move happens with probability .8 and each side with .1; the goal corner is absorbing with +1
    on entry; a step costs .01, from water .1.

    Args:
        size: cells per side.
        discount: `[*B]`.
        water_share: share of the cells that are water.
        seed: of where the water is.
        dtype: precision of the tables; None follows JAX.

    Returns:
        An MDP with S = size^2, A = 4.
    """
    cells = slippery_cells(size, water_share=water_share, seed=seed)
    return grid_world(cells, discount, slip=0.1, step=-0.01, water=-0.1, goal=1.0, dtype=dtype)


def chain(
    n_states: int = 6,
    discount: Any = 0.99,
    *,
    slip: float = 0.3,
    small: float = 0.01,
    large: float = 1.0,
    dtype: Any = None,
) -> MDP:
    """Make a river: drifting back is sure and pays a little at once, swimming up pays at the far end only.

    Args:
        n_states: S, at least 2.
        discount: `[*B]`.
        slip: probability that swimming up is carried one state back instead.
        small: reward of drifting in the first state.
        large: reward of swimming in the last state.
        dtype: precision of the tables; None follows JAX.

    Returns:
        An MDP with actions (back, up), started in the first state.
    """
    _check_size("n_states", n_states, 2)
    _check_probability("slip", slip)
    s = np.arange(n_states)
    back, up = np.maximum(s - 1, 0), np.minimum(s + 1, n_states - 1)
    outcomes = np.stack([np.stack([back, back], -1), np.stack([up, back], -1)], axis=1)
    chances = np.broadcast_to([[1.0, 0.0], [1.0 - slip, slip]], outcomes.shape)
    reward = np.zeros((n_states, 2))
    reward[0, 0], reward[-1, 1] = small, large
    return _assemble(Successors, _packed(outcomes, chances), reward, discount, np.eye(n_states)[0], dtype)


def ring(n_states: int = 20, discount: Any = 0.99, *, slip: float = 0.1, dtype: Any = None) -> MDP:
    """States on a circle, reward 1 in state 0: information travels one state per step.

    Args:
        n_states: S, at least 3.
        discount: `[*B]`.
        slip: probability that a move does not happen.
        dtype: precision of the tables; None follows JAX.

    Returns:
        An MDP with actions (backwards, forwards), started anywhere.
    """
    _check_size("n_states", n_states, 3)
    _check_probability("slip", slip)
    s = np.arange(n_states)
    moved = np.stack([(s - 1) % n_states, (s + 1) % n_states], axis=-1)
    outcomes = np.stack([moved, np.broadcast_to(s[:, None], moved.shape)], axis=-1)
    chances = np.broadcast_to([1.0 - slip, slip], outcomes.shape)
    reward = np.zeros((n_states, 2))
    reward[0] = 1.0
    return _assemble(Successors, _packed(outcomes, chances), reward, discount, None, dtype)


def garnet(
    n_states: int = 500,
    n_actions: int = 8,
    branching: int = 8,
    discount: Any = 0.99,
    *,
    seed: int = 0,
    dtype: Any = None,
) -> MDP:
    """Make a random MDP [Archibald, McKinnon and Thomas 1995]: random successors, rewards uniform in [0, 1).

    Args:
        n_states: S.
        n_actions: A.
        branching: K, distinct successors of every (s, a); their probabilities are uniform on the simplex.
        discount: `[*B]`.
        seed: of NumPy's default generator.
        dtype: precision of the tables; None follows JAX.

    Returns:
        An MDP with successor lists, started anywhere.
    """
    _check_size("n_states", n_states, 1)
    _check_size("n_actions", n_actions, 1)
    _check_size("branching", branching, 1)
    if not 1 <= branching <= n_states:
        raise ValueError(f"branching is {branching}; expected 1 to n_states = {n_states}")
    rng = _generator(seed)
    rows = n_states * n_actions
    successors = _distinct(rng, rows, n_states, branching)
    chances = rng.dirichlet(np.ones(branching), rows)
    reward = rng.random((n_states, n_actions))
    outcomes = successors.reshape(n_states, n_actions, branching)
    return _assemble(Successors, _packed(outcomes, chances), reward, discount, None, dtype)


def garnets(
    count: int,
    n_states: int = 64,
    n_actions: int = 4,
    branching: int = 5,
    discount: Any = 0.99,
    *,
    seed: int = 0,
    dtype: Any = None,
) -> MDP:
    """Many different Garnets in one batch: `garnet` with the seeds `seed`, `seed + 1`, ...

    Args:
        count: B, how many.
        n_states: S.
        n_actions: A.
        branching: distinct successors of every (s, a).
        discount: a number, or `[B]`.
        seed: of the first.
        dtype: precision of the tables; None follows JAX.

    Returns:
        An MDP whose transitions `[B, S, A, S]` and rewards `[B, S, A]` carry a batch axis.
    """
    _check_size("count", count, 1)
    _generator(seed)
    ones = [garnet(n_states, n_actions, branching, discount, seed=seed + i, dtype=dtype) for i in range(count)]
    dense = np.zeros((count, n_states, n_actions, n_states), ones[0].dtype)
    for one, table in zip(ones, dense):
        successors: Any = one.transitions
        np.put_along_axis(table, np.asarray(successors.indices), np.asarray(successors.probabilities), -1)
    return mdp(Dense(jnp.asarray(dense)), jnp.stack([one.reward for one in ones]), discount)


def _distinct(rng: np.random.Generator, rows: int, n: int, k: int) -> np.ndarray:
    """k different numbers below n per row, `[rows, k]`, every set equally likely [Floyd 1987]: memory rows * k."""
    drawn = np.empty((rows, k), np.int64)
    for i, top in enumerate(range(n - k, n)):
        number = rng.integers(0, top + 1, rows)
        taken = (drawn[:, :i] == number[:, None]).any(-1)
        drawn[:, i] = np.where(taken, top, number)
    return drawn


def _letters(cells: Sequence[str]) -> np.ndarray:
    """The drawing as letters `[rows, columns]`."""
    listed = isinstance(cells, list | tuple) and bool(cells)
    if not listed or not all(isinstance(row, str) and row for row in cells):
        raise ValueError(f'cells is {cells!r}; expected a list of strings, one per row, such as ["S.~", "..G"]')
    for i, row in enumerate(cells):
        if len(row) != len(cells[0]):
            raise ValueError(f"cells[{i}] has {len(row)} letters, the first row {len(cells[0])}; make them equal")
        for j, letter in enumerate(row):
            if letter not in CELLS:
                known = ", ".join(f"{key} {name}" for key, name in CELLS.items())
                raise ValueError(f"cells[{i}][{j}] is {letter!r}; expected one of: {known}")
    return np.array([list(row) for row in cells])


def _targets(letters: np.ndarray) -> np.ndarray:
    """The cell that each unslipped move reaches, `[S, 4]`."""
    rows, columns = letters.shape
    row, column = np.divmod(np.arange(rows * columns), columns)
    down, right = np.array(MOVES).T
    to_row, to_column = row[:, None] + down, column[:, None] + right
    inside = (to_row >= 0) & (to_row < rows) & (to_column >= 0) & (to_column < columns)
    here = np.arange(rows * columns)[:, None]
    there = np.where(inside, to_row * columns + to_column, here)
    flat = letters.ravel()
    stuck = (flat[there] == "#") | (flat[here] == "#") | (flat[here] == "G")
    return np.where(stuck, here, there)


def _start(flat: np.ndarray) -> np.ndarray:
    at = flat == "S"
    if not at.any():
        at = (flat != "#") & (flat != "G")
    if not at.any():
        raise ValueError("cells holds no cell to start from; draw at least one of: S start, . floor, ~ water")
    return at / at.sum()


def _packed(outcomes: np.ndarray, chances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Successor lists from `outcomes [S, A, K]` that may repeat, and their `chances` (S A K numbers)."""
    n_states, n_actions, k = outcomes.shape
    row = np.repeat(np.arange(n_states * n_actions), k)
    return checks.pack_successors(row, outcomes.ravel(), chances.reshape(-1), n_states, n_actions)


def _check_size(name: str, value: int, least: int) -> None:
    if not checks.count(name, value, least) < 2**31:
        raise ValueError(f"{name} is {value.bit_length()} bits long; expected at most 31")


def _generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(checks.count("seed", seed, 0))


def _check_probability(name: str, value: float, most: float = 1.0) -> None:
    _check_number(name, value)
    if not 0 <= value <= most:
        raise ValueError(f"{name} is {value}; expected a probability, from 0 to {most:g}")


def _check_number(name: str, value: float) -> None:
    x = checks.number(name, value)
    if x.ndim or not np.isfinite(x):
        raise ValueError(f"{name} must be one finite number, got {value!r}")


def _assemble(
    kind: Any,
    tables: tuple[np.ndarray, ...],
    reward: np.ndarray,
    discount: Any,
    initial: np.ndarray | None,
    dtype: Any,
    grid: tuple[int, ...] | None = None,
) -> MDP:
    """An MDP of `kind(*tables)`, whose last table holds the probabilities; `mdp` validates."""

    def cast(x: Any) -> Any:
        return x if x is None or dtype is None else x.astype(dtype)

    m = mdp(kind(*tables[:-1], cast(tables[-1])), cast(reward), discount, cast(initial))
    return m if grid is None else dataclasses.replace(m, grid=grid)
