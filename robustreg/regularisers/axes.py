"""How the axes of a regulariser's leaves meet those of the values that it is applied to: shapes alone, no arrays.

Leaves are `[*B]` (alpha, beta), `[*B, S]` (state_scale) and `[A]`, `[S, A]` or `[*B, S, A]` (the prior). The public
one-step methods take `[*B, ..., A]`, the regulariser's axes leading and the states, where it has any, next to last. A
solution has `[lanes, S, A]` in which the regulariser's axes are the *last* of the lanes, as NumPy broadcasts; that goes
in as well where the other reading does not fit. What can be read in two ways is refused, with both.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp

Shape = tuple[int, ...]


class Leaves(NamedTuple):
    """Shapes of a regulariser's leaves; None for one that it has not got."""

    alpha: Shape | None
    beta: Shape
    state_scale: Shape | None
    prior: Shape | None
    alpha_per_state: Shape | None = None

    @property
    def states(self) -> int | None:
        """Length of the state axis, None without one.

        Raises:
            ValueError: `state_scale` and the prior disagree.
        """
        own = {
            "state_scale": self.state_scale,
            "alpha_per_state": self.alpha_per_state,
            "prior": self.prior and self.prior[:-1],
        }
        found = {shape[-1] for shape in own.values() if shape}
        if len(found - {1}) > 1:
            shown = " and ".join(f"{name} {list(getattr(self, name))}" for name, shape in own.items() if shape)
            raise ValueError(
                f"{shown} are for different numbers of states; expected [*B, S] and [S, A] or [*B, S, A] (the prior)"
            )
        return max(found, default=None)

    @property
    def batch(self) -> Shape:
        """Batch axes of all leaves together.

        Raises:
            ValueError: they do not broadcast.
        """
        own = {
            "alpha": self.alpha,
            "beta": self.beta,
            "state_scale": self.state_scale and self.state_scale[:-1],
            "alpha_per_state": self.alpha_per_state and self.alpha_per_state[:-1],
            "prior": self.prior and self.prior[:-2],
        }
        own = {name: shape for name, shape in own.items() if shape}
        try:
            shape: Any = jnp.broadcast_shapes(*own.values())
            return shape
        except ValueError:
            raise ValueError(self._mismatch(own)) from None

    def _mismatch(self, own: dict[str, Shape]) -> str:
        for name in ("beta", "alpha"):
            if self.prior is not None and own.get(name) == self.prior[:-1]:
                per_state = f"for a beta per state of each lane, pass beta=1 and state_scale={name}; "
                return (
                    f"{name} {list(own[name])} and prior {list(self.prior)} can be read in two ways. A prior is "
                    f"[*B, S, A], here lanes {list(self.prior[:-2])} of {self.prior[-2]} states, which {name}, [*B], "
                    f"does not fit: {per_state if name == 'beta' else ''}for a lane per entry of {name}, of one state "
                    "each, pass prior[..., None, :], and values[..., None, :] to the methods"
                )
        shown = ", ".join(f"{name} {list(shape)}" for name, shape in own.items())
        return (
            f"the regulariser's batch axes do not broadcast: {shown}; expected alpha and beta [*B], state_scale "
            "[*B, S], prior [A], [S, A] or [*B, S, A]; give each the same leading axes, or insert axes of size 1"
        )


class Alignment(NamedTuple):
    """Where a regulariser's batch axes stand among those of some values.

    Attributes:
        shape: of the values, with axes of 1 that they lacked.
        before, after: axes of the values in front of the batch axes, and between them and the state axis.
        stateful: whether the axis next to last is the state axis.
    """

    shape: Shape
    before: int
    after: int
    stateful: bool

    def place(self, batch: Shape, rank: int, states: Shape) -> Shape:
        """Shape for a leaf `[*batch, *states]` of a regulariser of so many batch axes."""
        ones = (1,) * (self.before + rank - len(batch))
        return ones + batch + (1,) * self.after + (states if self.stateful else ())


def align(leaves: Leaves, shape: Shape, refuse: bool) -> Alignment:
    """Find the one way in which values of a shape fit a regulariser.

    Args:
        leaves: of the regulariser.
        shape: of the values, `[*B, ..., A]` or `[..., *B, S, A]`.
        refuse: what fits in both ways; else the regulariser's axes lead.

    Raises:
        ValueError: values that can be read in two ways, naming both and what to do.
    """
    batch, states = leaves.batch, leaves.states
    n = len(batch)
    given, shape = shape, (1,) * (n + 1 - len(shape)) + shape
    if len(shape) == n + 1:
        if states is None:
            return Alignment(shape, 0, 0, False)
        if n and states > 1 and max(shape[-2], batch[-1]) == states:
            raise ValueError(_lanes_or_states(given, batch, leaves))
        # One distribution against parameters per state: every state sees it.
        return Alignment((*shape[:-1], 1, shape[-1]), 0, 0, True)
    extra = len(shape) - 2 - n
    last = extra > 0 and max(batch, default=1) > 1 and _equal(shape[extra:-2], batch)
    first = _fits(shape[:n], batch)
    if last and first and refuse:
        raise ValueError(
            f"values of shape {list(given)} can be read in two ways with the regulariser's batch axes {list(batch)}: "
            "as [*B, ..., A], its axes leading, or as [..., *B, S, A], its axes the last of the lanes, as in a "
            f"solution. Reshape the lanes of its leaves to {list(batch + (1,) * extra)} for the first or to "
            f"{list((1,) * extra + batch)} for the second (beta[:, None] or beta[None, :])"
        )
    return Alignment(shape, extra, 0, True) if last and not first else Alignment(shape, 0, extra, True)


def mismatch(leaves: Leaves, shape: Shape) -> str:
    """Tell what to say of values that do not fit."""
    own = ", ".join(f"{name} {list(part)}" for name, part in leaves._asdict().items() if part)
    return (
        f"values of shape {list(shape)} do not fit the regulariser's {own or 'leaves'}; expected [*B, ..., A] with its "
        f"batch axes {list(leaves.batch)} leading, or [..., *B, S, A]; states are next to last; insert axes of size 1 "
        "where something is shared"
    )


def _lanes_or_states(shape: Shape, batch: Shape, leaves: Leaves) -> str:
    own = f"state_scale {list(leaves.state_scale)}, [*B, S]," if leaves.state_scale else ""
    own = own or f"prior {list(leaves.prior or ())}, [S, A] or [*B, S, A],"
    return (
        f"values of shape {list(shape)} can be read in two ways: the regulariser has lanes {list(batch)}, and its "
        f"{own} {leaves.states} states in every lane. If the values are those of lanes, the same in every state, pass "
        f"values[..., None, :]: the result has axes {[*batch, leaves.states]}. If one axis of {leaves.states} is "
        "meant, with a beta, a prior and a row of values each, make it the states, with beta=1 and state_scale=beta, "
        "or lanes of one state each, with prior[..., None, :] and values[..., None, :]"
    )


def _equal(shape: Shape, batch: Shape) -> bool:
    """Whether a shape has room for batch axes without being broadcast itself."""
    return all(b in (1, x) for x, b in zip(shape, batch))


def _fits(shape: Shape, batch: Shape) -> bool:
    return all(1 in (x, b) or x == b for x, b in zip(shape, batch))
