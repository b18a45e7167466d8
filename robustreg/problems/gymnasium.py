"""MDPs of Gymnasium's toy-text environments, and transitions from SciPy's sparse matrices.

* Gymnasium's toy-text environments carry their model as `P[s][a]`, a list of `(probability, successor,
  reward, terminated)`. Two things make a naive reading wrong: a successor may be listed several times, and
  `terminated` means that nothing follows, whatever the model says of the successor (ignored, Taxi is worth
  835 instead of 6.33).
* SciPy sparse matrices go straight into `mdp`, one per action; `from_scipy` gives the `Successors` alone.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from robustreg._core import checks
from robustreg.problems import tables
from robustreg.problems.mdps import MDP
from robustreg.problems.successors import Successors

# ---- Gymnasium


def from_gymnasium(env: Any, discount: Any = 0.99, *, initial: Any = None) -> MDP:
    """Read the MDP of a tabular Gymnasium environment.

    Args:
        env: an environment whose `env.unwrapped` has the model `P` (FrozenLake, Taxi, CliffWalking), the name
            of one, or the table itself, `P[s][a] = [(probability, successor, reward, terminated), ...]`. States and
            actions may have names instead of numbers, and actions may be missing: see `from_table`.
        discount: `[*B]`; 1 is the plain return of an episode, see `robustreg.solvers.undiscounted`.
        initial: distribution of the initial state; None takes the environment's `initial_state_distrib`, or the `isd`
            of gym's older `DiscreteEnv` (uniform where there is neither).

    Returns:
        An MDP with successor lists. S is that of the environment; transitions with `terminated` add to
        `termination` and not to the successors, and their reward counts.

    Raises:
        TypeError: if `env` has no table of transitions.
        ValueError: if the table is inconsistent; names the first offender.
        ImportError: if a name is given and Gymnasium is not installed.
    """
    if isinstance(env, str):
        env = _make(env)
    inner: Any = env if isinstance(env, (Mapping, Sequence)) else getattr(env, "unwrapped", env)
    table = inner if isinstance(inner, (Mapping, Sequence)) else getattr(inner, "P", None)
    if table is None:
        raise TypeError(
            f"{type(inner).__name__} has no table of transitions P; only tabular environments (FrozenLake, "
            "Taxi, CliffWalking) publish one: for others build rr.mdp(...) yourself"
        )
    if initial is None:
        initial = _first_states(inner)
    if not tables.is_numbered(table):
        return tables.from_table(table, discount, initial=initial)
    m = tables.assemble(*tables.numbered_table(table, _n_states(inner, table)), discount, initial)
    return dataclasses.replace(m, grid=_grid(inner, m.n_states))


def _first_states(env: Any) -> Any:
    """Where episodes start: Gymnasium's name for it, or `isd` of gym's `DiscreteEnv`; None where neither is there."""
    found = (getattr(env, name, None) for name in ("initial_state_distrib", "isd"))
    return next((x for x in found if x is not None), None)


def _make(name: str) -> Any:
    try:
        import gymnasium
    except ImportError as error:
        raise ImportError('from_gymnasium needs Gymnasium for a name: pip install "robustreg[gym]"') from error
    return gymnasium.make(name)


def _n_states(env: Any, table: Any) -> int:
    n = int(getattr(getattr(env, "observation_space", None), "n", getattr(env, "nS", len(table))))
    if n != len(table):
        raise ValueError(f"P lists {len(table)} states, observation_space {n}; give every state its actions")
    return n


def _grid(env: Any, n_states: int) -> tuple[int, int] | None:
    """The grid where states are its cells: FrozenLake says nrow and ncol, CliffWalking shape."""
    shape = getattr(env, "shape", None) or (getattr(env, "nrow", 0), getattr(env, "ncol", 0))
    fits = len(shape) == 2 and shape[0] * shape[1] == n_states
    return (int(shape[0]), int(shape[1])) if fits else None


# ---- SciPy


def from_scipy(matrices: Sequence[Any]) -> Successors:
    """Successor lists from sparse matrices, repeated entries accumulated.

    Args:
        matrices: one SciPy sparse `[S, S]` per action, matrices (`csr_matrix`) or arrays (`csr_array`) of any
            format.

    Returns:
        `Successors` with K the largest number of successors, unchecked: `mdp` checks it, or takes the list.
    """
    indices, probabilities = checks.pack_sparse(matrices)
    dtype = checks.working_dtype(list(matrices))
    return Successors(jnp.asarray(indices), jnp.asarray(probabilities.astype(dtype)))
