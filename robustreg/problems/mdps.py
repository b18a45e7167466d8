"""Markov decision processes: a plain pytree, and the factory that checks what goes into it.

**Problem.** Transitions `P(s' | s, a)`, expected rewards `r(s, a)`, a discount `g` and a distribution of the
initial state. With `termination`, the episode ends after `(s, a)` with that probability and nothing follows:
the rows of P then sum to `1 - termination`, which is all that the Bellman operator needs.

**Batches.** Any leaf may carry leading batch axes; they broadcast as in NumPy; what is shared stays shared.

**Precision.** Everything is computed on the host in double precision and then cast once. `complement = 1 - g`
is a leaf of its own: taken from a g rounded to float32, it moves values by 9e-5 at g = .99 and by 1.6 at
g = .9999. Rows are rescaled to sum to `1 - termination` to rounding: a deficit of 1e-6 in a row costs as much
value as a change of 1e-6 in g.

`MDP` never checks anything (its leaves may be tracers); `mdp` does, and skips value checks on tracers.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from robustreg._core import checks, containers, forks, pytrees
from robustreg._core.names import Names, by_name, distribution
from robustreg.problems import arguments, episodes, rewards
from robustreg.problems.transitions import Transitions


@pytrees.dataclass
class MDP:
    """A Markov decision process. Built by `mdp`, which validates; the class itself never does.

    Attributes:
        transitions: `Dense`, `Successors` or `MatrixFree`.
        reward: expected reward, `[*B, S, A]`.
        discount: `[*B]`, in [0, 1), or 1 where episodes end.
        complement: `1 - discount`, `[*B]`, from double precision where that was known.
        initial: distribution of the initial state, `[*B, S]`.
        termination: probability that the episode ends after (s, a), `[*B, S, A]`, or None for never.
        grid: (rows, columns) where states are cells in row-major order, for figures; no solver reads it.
        available: whether state s has action a, `[*B, S, A]` booleans, or None for always; see `regularisers.masks`.
        names: of states and actions, or None; see `robustreg._core.names`. No solver reads them.
        raw: whether the mask is a leaf of truth values, as the library's own programs take it.
        undiscounted: whether a discount may be 1, None before anybody has looked; see `solvers.undiscounted`.
    """

    transitions: Transitions
    reward: Array
    discount: Array
    complement: Array
    initial: Array
    termination: Array | None = None
    grid: tuple[int, int] | None = pytrees.static(read=tuple, default=None)
    available: Array | None = pytrees.discrete(bool, default=None)
    names: Names | None = pytrees.static(Names.to_json, Names.from_json, default=None)
    raw: bool = pytrees.static(default=False, repr=False)
    undiscounted: bool | None = pytrees.static(default=None, repr=False)

    @property
    def n_states(self) -> int:
        """S."""
        return self.transitions.n_states

    @property
    def n_actions(self) -> int:
        """A."""
        return self.transitions.n_actions

    @property
    def dtype(self) -> np.dtype:
        """Working precision: the widest of the floating leaves, as JAX is configured to hold it; at least float32."""
        return checks.working_dtype(self.transitions, self.reward, self.initial, self.termination)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Batch axes of all leaves, broadcast together."""
        return jnp.broadcast_shapes(*_batch_axes(self).values())

    def by_name(self, x: Any) -> dict[Any, Any]:
        """Label an array over states, or over states and actions, with their names (their numbers without names).

        Args:
            x: `[S]` or `[S, A]`, such as a solution's `value` or `policy`; of a batch, one lane.

        Returns:
            `{state: number}`, or `{state: {action: number}}` with the actions that the state has.

        Raises:
            ValueError: another shape.
        """
        return by_name(self.names, self.available, (self.n_states, self.n_actions), x)

    def prepared(self) -> "MDP":
        """Find out beforehand what `solve` makes of transitions that it can look at, and keep it with the MDP.

        Successor lists have patterns that make products cheaper (see `problems.sparsity`). An MDP that is an argument
        of your own `jax.jit` cannot be looked at any more where it is solved: prepare it before it goes in, and solving
        it takes as long as if the function closed over it.

        Returns:
            The same MDP, equal in everything else. Its successor lists must not be changed (`dataclasses.replace`)
            without preparing it again.
        """
        return dataclasses.replace(self, transitions=self.transitions.prepared())

    def replace(self, **changes: Any) -> "MDP":
        """Replace some of `reward`, `discount`, `initial` and `termination`, checked as `mdp` checks them.

        Args:
            changes: by name; a reward `[*B, S, A]` or `[S]`, the others as in `mdp`. They may be traced.

        Returns:
            An MDP of the same transitions, mask, names and dtype.

        Raises:
            ValueError: a name that is none of these, or what `mdp` raises. A new `termination` has to leave the rows of
                the transitions summing to `1 - termination`, within the precision of the latter.
        """
        return _replaced(self, changes)

    def _with_sparsity(self) -> "MDP":
        """Cast to the working precision, and add what can be known of transitions before they are traced."""
        m = self._canonical()
        # Names are left off: they would compile everything anew.
        kernel = m.transitions._with_sparsity(m.dtype)
        return dataclasses.replace(m, transitions=kernel, names=None, raw=True, undiscounted=m._may_not_discount())

    def _may_not_discount(self) -> bool:
        """Whether a discount may be 1: programs of problems where none is are spared what only those need."""
        if checks.is_traced(self.discount):
            return self.termination is not None and self.undiscounted is not False
        return self.termination is not None and bool((np.asarray(self.discount) == 1).any())

    def _canonical(self) -> "MDP":
        """Cast every floating leaf to the working precision; see `checks.canonical`."""
        return checks.canonical(self, self.dtype)


def mdp(
    transitions: Any,
    reward: Any,
    discount: Any,
    initial: Any = None,
    termination: Any = None,
    *,
    layout: str | None = None,
    normalise: bool = False,
    available: Any = None,
) -> MDP:
    """Check and assemble a Markov decision process.

    Args:
        transitions: `[*B, S, A, S]` array, `[A, S, S]` with `layout="ass"`, a list of A sparse `[S, S]` (of SciPy or
            JAX), a dict of one `[S, S]` per action's name, or a `Dense`, `Successors` or `MatrixFree`.
        reward: expected reward `[*B, S, A]`; `[S]`, the same for every action; or `[S, A, S]`, or a matrix `[S, S]` per
            action (`[A, S, S]` with `layout="ass"`), averaged here over successors jointly with P. That average has no
            share for the step that ends an episode: with `termination`, add the reward of that step to an `[S, A]` one.
        discount: `[*B]`, in [0, 1). A Python float (or float64) keeps `1 - discount` exact in float32 too. 1, the plain
            sum over an episode, with a `termination` that can be reached from every state; see `solvers.undiscounted`.
        initial: distribution of the initial state, `[*B, S]`; None is uniform.
        termination: probability that the episode ends after (s, a), `[*B, S, A]` or `[S]`, the same for every action;
            value 0 beyond. Rows of P then sum to `1 - termination`.
        layout: axes of a plain array of transitions, "sas" or "ass". None is "sas", except that an array that
            could be either is refused.
        normalise: rescale rows of P to `1 - termination`, and `initial` to 1, however far they are from it.
        available: whether state s has action a, `[*B, S, A]` booleans; None: always. What the other arguments say of an
            action that is not there is not looked at (rows of zeros, rewards of minus infinity). It is never played,
            by no policy of a solve and by no optimum; regularisers are restricted to the others (`masks.restricted`).

    Any array may be a data frame, an xarray or torch array, or sparse: see `robustreg._core.containers`.

    Returns:
        An `MDP` whose dtype is that of the floating arrays given (at least float32; float64 only with x64).

    Raises:
        ValueError: names the first offending entry and the remedy.
        TypeError: if an argument is not numeric, or indices are not integers.
    """
    forks.refuse()
    came = containers.transitions(transitions, layout)
    reward = containers.by_action(reward, came.actions) if isinstance(reward, Mapping) else reward
    reward = containers.plain("reward", reward, came.states)
    discount, termination, initial, available = (
        containers.plain(name, x, came.states)
        for name, x in zip(
            ("discount", "termination", "initial", "available"), (discount, termination, initial, available)
        )
    )
    dtype = checks.working_dtype(came.data, reward, initial, termination)  # a discount only follows
    kernel, margin, available = arguments.kernel_of(came, layout, available)
    termination = arguments.termination_of(termination, kernel, available)
    kernel = arguments.stochastic(kernel, termination, margin, normalise, dtype, available)
    discount, complement = arguments.discount_of(discount, dtype, termination is not None)
    names = came.names(kernel.n_states, kernel.n_actions)
    m = MDP(
        arguments.cast_kernel(kernel, dtype),
        arguments.cast(rewards.expected(reward, kernel, available, came.per_action), dtype),
        discount,
        complement,
        arguments.cast(arguments.initial_of(_by_state(initial, names), kernel.n_states, normalise), dtype),
        None if termination is None else arguments.cast(termination, dtype),
        available=None if available is None else jnp.asarray(available),
        names=names,
    )
    checks.check_batches(_batch_axes(m))
    episodes.refuse_endless(m)
    return m


def _by_state(initial: Any, names: Names | None) -> Any:
    """Read where episodes start, by the names of states where they have some."""
    return initial if names is None else distribution(initial, {name: s for s, name in enumerate(names.states)})


def _replaced(m: MDP, changes: dict[str, Any]) -> MDP:
    """See `MDP.replace`."""
    allowed = ("reward", "discount", "initial", "termination")
    unknown = [name for name in changes if name not in allowed]
    if unknown:
        raise ValueError(f"replace takes {', '.join(allowed)}, not {unknown[0]}; build another MDP with rr.mdp")
    new: dict[str, Any] = {
        name: containers.plain(name, x, None if m.names is None else m.names.states) for name, x in changes.items()
    }
    available = m.available if checks.is_traced(m.available) or m.available is None else np.asarray(m.available)
    if "termination" in new:
        new["termination"] = _ends(m, arguments.termination_of(new["termination"], m, available), available)
    if "reward" in new:
        new["reward"] = arguments.cast(rewards.expected(new["reward"], m.transitions, available, False), m.dtype)
    if "discount" in new:
        ends = new.get("termination", m.termination) is not None
        new["discount"], new["complement"] = arguments.discount_of(new["discount"], m.dtype, ends)
    if "initial" in new:
        start = arguments.initial_of(_by_state(new["initial"], m.names), m.n_states, False)
        new["initial"] = arguments.cast(start, m.dtype)
    if new.get("termination", m) is None:
        arguments.discount_of(new.get("discount", m.discount), m.dtype)
    m = dataclasses.replace(m, **new, undiscounted=None)
    checks.check_batches(_batch_axes(m))
    episodes.refuse_endless(m)
    return m


def _ends(m: MDP, termination: Any, available: Any) -> Any:
    """A termination of the working precision, refused where the rows of an MDP do not leave room for it."""
    margin = checks.tolerance(getattr(m.transitions, "probabilities", None))
    arguments.stochastic(arguments.at_hand(m.transitions), termination, margin, False, m.dtype, available)
    return None if termination is None else arguments.cast(termination, m.dtype)


def _batch_axes(m: MDP) -> dict[str, tuple[int, ...]]:
    some = {"termination": m.termination, "available": m.available}
    return {
        "transitions": m.transitions.batch_shape,
        "reward": m.reward.shape[:-2],
        "discount": m.discount.shape,
        "initial": m.initial.shape[:-1],
        **{name: x.shape[:-2] for name, x in some.items() if x is not None},
    }
