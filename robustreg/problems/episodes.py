"""Whether episodes end: at a discount of 1 a value is a sum over one whole episode, which has to be over some time.

A *policy* is proper if its episodes end with probability 1, whatever the state they start in; else it keeps some set of
states closed, from which nothing ever ends. Two sets of states tell what there is, both of the graph of what is
possible, whatever the probabilities:

* those that an end can be reached from: the least set that holds every state with an action that may end the episode,
  and every state with an action that may lead into the set. Where it is all states some policy is proper (the one that
  plays everything is), and where a state is missing none is;
* those in which one may stay forever: the greatest set in which every state has an action that never ends the episode
  and never leads out of the set. Where it is empty every policy is proper, and where a state is in it a policy that
  stays is not [Bertsekas and Tsitsiklis 1991].

Each takes as many sweeps as the longest of the shortest ways.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from robustreg._core import checks, loops, pytrees
from robustreg.problems.transitions import Transitions


def leading_to_an_end(transitions: Transitions, allowed: Array, ends: Array, dtype: Any) -> Array:
    """Find the states that an end can be reached from, `[S, *b]`.

    Args:
        transitions: bound to the kernels' layout.
        allowed: actions that may be taken, `[A, S, *b]`, broadcastable.
        ends: after which the episode may end, `[A, S, *b]`.
        dtype: to compute in.
    """

    def spread(found: Array) -> Array:
        leads = transitions._expect(found.astype(dtype)) > 0
        return found | jnp.any(allowed & leads, axis=0)

    return loops.until_stable(spread, jnp.any(allowed & ends, axis=0), (transitions, allowed))


def stays(transitions: Transitions, allowed: Array, ends: Array, dtype: Any) -> Array:
    """Find the states in which one may stay forever, `[S, *b]`; arguments as in `leading_to_an_end`."""

    def shrink(kept: Array) -> Array:
        leaves = transitions._expect((~kept).astype(dtype)) > 0
        return kept & jnp.any(allowed & ~ends & ~leaves, axis=0)

    return loops.until_stable(shrink, jnp.any(allowed & ~ends, axis=0), (transitions, allowed))


@jax.jit
def _sets(transitions: Transitions, termination: Array, log_prior: Array | None, available: Any) -> tuple[Array, Array]:
    """Both sets in the public layout, `[*b, S]`: where an end can be reached, and where one may stay."""
    dtype = termination.dtype
    shapes = [transitions.batch_shape, termination.shape[:-2]]
    shapes += [x.shape[:-2] for x in (log_prior, available) if x is not None and x.ndim > 1]
    batch = jnp.broadcast_shapes(*shapes)
    n, size = len(batch), termination.shape[-2:]
    allowed = jnp.ones((size[1], size[0], *batch), bool)
    for mask in (available, None if log_prior is None else ~jnp.isneginf(log_prior)):
        if mask is not None:
            mask = jnp.broadcast_to(mask, mask.shape[:-2] + size)
            allowed = allowed & pytrees.lanes_last(mask, n, 2)
    bound, ends = transitions.bind(n, dtype), pytrees.lanes_last(termination > 0, n, 2)
    found = leading_to_an_end(bound, allowed, ends, dtype), stays(bound, allowed, ends, dtype)
    return tuple(pytrees.batch_first(jnp.broadcast_to(x, (size[0], *batch)), 1) for x in found)  # type: ignore[return-value]


def _of(m: Any, reg: Any) -> tuple[np.ndarray, np.ndarray]:
    m = m._canonical()
    termination = m.termination
    if termination is None:
        termination = jnp.zeros((m.n_states, m.n_actions), m.dtype)
    log_prior = None if reg is None else reg.log_prior
    with jax.ensure_compile_time_eval():
        found = _sets(m.transitions, termination, log_prior, m.available)
    return np.asarray(found[0]), np.asarray(found[1])


def endless_states(mdp: Any, reg: Any = None) -> np.ndarray:
    """Find the states in which some policy can stay so that its episodes never end.

    Args:
        mdp: an MDP, whose discount does not matter.
        reg: with a regulariser, actions that its prior forbids are not played.

    Returns:
        `[*B, S]` booleans. Where none is true every policy's episodes end. Where one is, a policy may go on forever:
        to give every policy a value at discount 1, take the actions that allow it away (`available`, or a prior of 0),
        or give a discount below 1.

    Raises:
        TypeError: inside jit, vmap or grad.
    """
    if checks.is_traced(mdp, reg):
        raise TypeError("endless_states reads values, so it cannot run inside jit, vmap or grad")
    return _of(mdp, reg)[1]


def refuse_endless(m: Any) -> None:
    """Refuse an MDP with a discount of 1 and a state from which no policy's episode ends; no check on tracers.

    Raises:
        ValueError: names the first such state and the remedy.
    """
    if m.termination is None or checks.is_traced(m.discount) or not (np.asarray(m.discount) == 1).any():
        return
    if checks.is_traced(m):
        return
    found, _ = _of(m, None)
    undiscounted = np.asarray(m.discount) == 1
    shape = np.broadcast_shapes(found.shape[:-1], undiscounted.shape)
    bad = np.broadcast_to(undiscounted[..., None], (*shape, 1)) & ~np.broadcast_to(found, (*shape, found.shape[-1]))
    index = checks.first(bad)
    if index is not None:
        state = "" if m.names is None else f" ({m.names.states[index[-1]]!r})"
        place = checks.place("states", index, ("s",))
        raise ValueError(
            f"discount is 1, but no episode that comes to {place}{state} ever ends, whatever is done: "
            "give the state a way out or a termination, or a discount below 1"
        )
