"""Handles for a training loop: the numbers of a problem that are to be learned, and the way back to the problem.

An MDP is a pytree of all its numbers. An optimiser that is given all of them changes all of them: P would stop being a
matrix of probabilities, and the discount would drift. `trainable` hands out those that are meant, by name.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from robustreg.problems.mdps import MDP
from robustreg.regularisers.regulariser import Regulariser

_T = TypeVar("_T", bound=MDP | Regulariser)


def trainable(problem: _T, *names: str) -> tuple[dict[str, Array], Callable[[dict[str, Array]], _T]]:
    """Take named numbers out of an MDP or a regulariser, for an optimiser, and make the way back.

    Args:
        problem: an MDP, or a regulariser.
        names: of an MDP "reward", "discount", "initial", "termination" and "probabilities" (those of its transitions),
            where it has them; of a regulariser its leaves, such as "beta", "alpha", "log_prior" and "state_scale".

    Returns:
        The numbers by name, arrays of the shapes that they have in the problem, and a function of such a dict that
        returns the problem with them in their places. It may be called inside `jax.jit`, and closes over all the rest,
        concrete, so that solving is as fast as for a problem that the function closes over. Nothing is checked on the
        way back: what has to be positive, or to sum to 1, is for the caller to parametrise.

    Raises:
        TypeError: neither an MDP nor a regulariser.
        ValueError: no names, or one that it has no numbers for.
    """
    if not isinstance(problem, (MDP, Regulariser)):
        raise TypeError(f"trainable takes an MDP or a regulariser, got {type(problem).__name__}")
    there = _numbers(problem)
    wrong = [name for name in names if name not in there]
    if wrong or not names:
        which = f"has no numbers {wrong[0]!r}" if wrong else "needs the names of what is to be learned"
        raise ValueError(f"this {type(problem).__name__} {which}; there are: {', '.join(there)}")

    def rebuild(numbers: dict[str, Array]) -> _T:
        if sorted(numbers) != sorted(set(names)):
            raise ValueError(f"expected numbers for {', '.join(sorted(set(names)))}, got {', '.join(sorted(numbers))}")
        return _with(problem, dict(numbers))

    return {name: there[name] for name in names}, rebuild


def _numbers(problem: Any) -> dict[str, Array]:
    """List the floating leaves that may be learned, by name."""
    if not isinstance(problem, MDP):
        return {
            field.name: x for field in dataclasses.fields(problem) if _is_floating(x := getattr(problem, field.name))
        }
    found = {name: getattr(problem, name) for name in ("reward", "discount", "initial", "termination")}
    found["probabilities"] = getattr(problem.transitions, "probabilities", None)
    return {name: x for name, x in found.items() if x is not None}


def _is_floating(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.floating)


def _with(problem: Any, numbers: dict[str, Array]) -> Any:
    """Put numbers back; the complement of a discount follows it."""
    if "discount" in numbers:
        # Not 1 - g, which has lost digits in single precision where g is close to 1: the known one, less the change.
        numbers["complement"] = problem.complement - (numbers["discount"] - problem.discount)
    if "probabilities" in numbers:
        kernel: Any = problem.transitions
        numbers["transitions"] = dataclasses.replace(kernel, probabilities=numbers.pop("probabilities"))
    return dataclasses.replace(problem, **numbers)
