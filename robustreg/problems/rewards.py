"""Rewards in the shapes that people have them in, made the expected reward of a state and an action.

A reward of the successor, `r(s, a, s')`, is averaged jointly with P once and before any policy, so that the result
holds for every policy: `sum_{s'} P(s' | s, a) r(s, a, s')`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from robustreg._core import checks, containers
from robustreg.problems.matrix_free import MatrixFree
from robustreg.problems.successors import Successors
from robustreg.regularisers import masks


def expected(reward: Any, kernel: Any, available: Any, per_action: bool) -> Any:
    """Read a reward, and average it over successors where it depends on them.

    Args:
        reward: `[*B, S, A]`, `[S]`, `[S, A, S]`, or out of their containers: one matrix `[S, S]` per action, sparse or
            not, or a sparse `[S, A]`.
        kernel: the transitions, whose arrays are float64 or tracers.
        available: mask `[*B, S, A]` or None; what stands where there is no action becomes 0.
        per_action: whether transitions came as `[A, S, S]` or as a matrix per action; the reward may then too.

    Returns:
        `[*B, S, A]`, float64 or a tracer.

    Raises:
        ValueError: a shape that fits none of these, or two; a reward that is not finite.
    """
    if isinstance(reward, list) and any(containers.is_sparse(part) for part in reward):
        reward = _of_matrices(reward, kernel)
        axes = ("s", "a", "k") if isinstance(kernel, Successors) else ("s", "a", "s'")
        return _averaged(_finite(reward, available, axes), kernel, isinstance(kernel, Successors))
    reward = checks.number("reward", containers.as_array("reward", reward))
    n_states, n_actions = kernel.n_states, kernel.n_actions
    reading = _reading(reward.shape, n_states, n_actions, per_action)
    if reading == "s":
        reward = reward[:, None] + np.zeros((1, n_actions), reward.dtype)
    if reading == "ass":
        reward = reward.swapaxes(0, 1)
    if reading == "sa" and reward.shape[-2:] != (n_states, n_actions):
        remedy = "also accepted: [S], and [S, A, S], the latter also as a matrix [S, S] per action"
        if reward.shape == (n_actions, n_states):
            remedy = "it looks transposed: pass reward.T"
        if reward.shape == (n_actions, n_states, n_states):
            remedy = 'it looks like [A, S, S]: pass reward.swapaxes(0, 1), or transitions with layout="ass" too'
        checks.expect_shape("reward", reward.shape, (n_states, n_actions), "S, A", remedy)
    if reading in ("sas", "ass"):
        return _averaged(_finite(reward, available, ("s", "a", "s'")), kernel, False)
    return _finite(reward, available, ("s", "a"))


def _reading(shape: tuple[int, ...], n_states: int, n_actions: int, per_action: bool) -> str:
    """Which axes a reward of some shape has: "s", "sas", "ass", or "sa" for all else."""
    if shape == (n_states,):
        return "s"
    fits = {"sas": (n_states, n_actions, n_states), "ass": (n_actions, n_states, n_states)}
    found = [name for name in fits if shape == fits[name] and (name == "sas" or per_action)]
    if found and shape[1:] == (n_states, n_actions):
        read = "[S, A, S], as [A, S, S]" if per_action else "[S, A, S]"
        raise ValueError(
            f"reward of shape {shape} with S == A reads as {read} and as [B, S, A]; "
            "pass (P * reward).sum(-1), or reward[None] for a batch"
        )
    return found[0] if found else "sa"


def _finite(reward: Any, available: Any, axes: tuple[str, ...]) -> Any:
    """The reward with 0 where there is no action; refuses what is not finite elsewhere."""
    core = len(axes)
    reward = masks.fill(reward, available, np.zeros((1,) * core), core)
    if not checks.is_traced(reward):
        rule = "rewards must be finite; to forbid an action, give it prior 0 in the regulariser"
        rule += "; where a state has no such action, pass available=[S, A] with False there"
        checks.refuse("reward", reward, ~np.isfinite(reward), axes, rule)
    return reward


def _of_matrices(matrices: list[Any], kernel: Any) -> Any:
    """Rewards of a matrix per action, `[S, A, S]`, or at the successors alone, `[S, A, K]`, where those are lists."""
    n_states, n_actions = kernel.n_states, kernel.n_actions
    if len(matrices) != n_actions:
        raise ValueError(f"reward is a list of {len(matrices)} matrices; expected one per action, {n_actions}")
    for a, matrix in enumerate(matrices):
        if tuple(np.shape(matrix)) != (n_states, n_states):
            got = f"reward[{a}] has shape {list(np.shape(matrix))}"
            raise ValueError(f"{got}; expected one matrix [S, S] = [{n_states}, {n_states}] per action")
    if not isinstance(kernel, Successors) or checks.is_traced(matrices, kernel.indices):
        return checks.number("reward", containers.as_array("reward", matrices)).swapaxes(0, 1)
    indices = np.asarray(kernel.indices)
    return np.stack([containers.looked_up(x, indices[:, a]) for a, x in enumerate(matrices)], axis=1)


def _averaged(reward: Any, kernel: Any, listed: bool) -> Any:
    """`sum_{s'} P(s'|s,a) r(s,a,s')`; `listed`: the reward is `[S, A, K]`, of the successors in their lists."""
    if isinstance(kernel, MatrixFree):
        raise ValueError("reward [S, A, S] needs transitions as an array; with MatrixFree pass the expected [S, A]")
    p = kernel.probabilities
    traced = checks.is_traced(reward, p, getattr(kernel, "indices", None))
    xp: Any = jnp if traced else np
    if isinstance(kernel, Successors) and not listed:
        reward = xp.take_along_axis(reward, xp.asarray(kernel.indices), axis=-1)
    if traced:
        dtype = jax.dtypes.canonicalize_dtype(np.result_type(p.dtype, reward.dtype))
        p, reward = (_cast(x, dtype) for x in (p, reward))
        reward = reward.reshape((1,) * (p.ndim - 3) + reward.shape)
    return (p * reward).sum(-1)


def _cast(x: Any, dtype: Any) -> Any:
    return lax.convert_element_type(x, dtype) if checks.is_traced(x) else jnp.asarray(np.asarray(x, dtype))
