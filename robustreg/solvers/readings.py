"""Lanes or states: what one axis of a number per problem can mean, and the refusal of what can be read both ways.

A discount or a beta of shape `[B]` is one number per lane. With as many lanes as there are states, and no other
argument that has lanes, it may as well have been meant as one number per state, which both are in some textbooks. The
answers differ, and both look right.
"""

from typing import Any

import numpy as np

from robustreg._core import checks
from robustreg.problems.mdps import MDP
from robustreg.regularisers import axes


def refuse_states_as_lanes(mdp: MDP, reg: Any = None, *others: tuple[int, ...]) -> None:
    """Refuse a discount or beta with one entry per state where nothing else has lanes.

    Args:
        mdp: the problem.
        reg: its regulariser, or None.
        *others: batch shapes of further arguments.

    Raises:
        ValueError: names both readings and how to say either. (Not of tracers: in a caller's jit the shapes of lanes
            are those of the caller's program, which may have been checked before.)
    """
    batched = {"discount": mdp.discount.shape}
    if reg is not None:
        parts: axes.Leaves = reg._leaves
        batched |= {"beta": parts.beta, "alpha": parts.alpha or (), "prior": (parts.prior or ())[:-2]}
        # Who scales states says with it that beta does not.
        batched |= {"state_scale": parts.state_scale or (), "alpha_per_state": parts.alpha_per_state or ()}
    rest = (mdp.transitions.batch_shape, mdp.reward.shape[:-2], mdp.initial.shape[:-1], *others)
    masks = tuple(x.shape[:-2] for x in (mdp.termination, mdp.available) if x is not None)
    found = [name for name, shape in batched.items() if shape]
    n, shape = mdp.n_states, batched[found[0]] if found else ()
    alone = len(found) == 1 and found[0] in _READINGS and not any((*rest, *masks))
    if alone and shape == (n,) and n > 1 and not checks.is_traced(mdp.discount, getattr(reg, "beta", None)):
        raise ValueError(
            f"{found[0]} has shape [{n}], nothing else has lanes, and there are {n} states: that reads in two ways. "
            f"{_READINGS[found[0]].replace('$S', str(n))}"
        )


_READINGS = {
    "discount": (
        "For $S lanes, one problem per discount, give another argument the axis too: reward[None]. For a discount g of "
        "each state, pass discount=g.max(), transitions=P * (g / g.max())[:, None, None] and "
        "termination=1 - g / g.max(), which is the same problem"
    ),
    "beta": (
        "For $S lanes, one problem per beta, say that states have none of their own with state_scale=np.ones($S), or "
        "use rr.sweep. For a beta of each state, pass beta=1.0 and state_scale=beta"
    ),
}


def shape_of(x: Any, core: int = 0) -> tuple[int, ...]:
    """Return the batch shape of an argument that may be None, with `core` axes after it."""
    shape = () if x is None else np.shape(x)
    return shape[: len(shape) - core]
