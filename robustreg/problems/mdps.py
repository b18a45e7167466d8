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
from jax import Array, lax

from robustreg._core import checks, containers, forks, pytrees
from robustreg._core.names import Names, by_name, distribution
from robustreg.problems import function_checks, rewards
from robustreg.problems.successors import Successors
from robustreg.problems.transitions import Dense, MatrixFree, Transitions
from robustreg.regularisers import masks


@pytrees.dataclass
class MDP:
    """A Markov decision process. Built by `mdp`, which validates; the class itself never does.

    Attributes:
        transitions: `Dense`, `Successors` or `MatrixFree`.
        reward: expected reward, `[*B, S, A]`.
        discount: `[*B]`, in [0, 1).
        complement: `1 - discount`, `[*B]`, from double precision where that was known.
        initial: distribution of the initial state, `[*B, S]`.
        termination: probability that the episode ends after (s, a), `[*B, S, A]`, or None for never.
        grid: (rows, columns) where states are cells in row-major order, for figures; no solver reads it.
        available: whether state s has action a, `[*B, S, A]` booleans, or None for always; see `regularisers.masks`.
        names: of states and actions, or None; see `robustreg._core.names`. No solver reads them.
        raw: whether the mask is a leaf of truth values, as the library's own programs take it.
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

    def _prepared(self) -> "MDP":
        """Cast to the working precision, and add what can be known of transitions before they are traced."""
        forks.refuse()
        m = self._canonical()
        # Names are left off: they would compile everything anew.
        return dataclasses.replace(m, transitions=m.transitions._prepared(m.dtype), names=None, raw=True)

    def _canonical(self) -> "MDP":
        """Cast every floating leaf to the working precision; see `_host.canonical`."""
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
        discount: `[*B]`, in [0, 1). A Python float (or float64) keeps `1 - discount` exact in float32 too.
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
    kernel, margin, available = _kernel(came, layout, available)
    termination = _termination(termination, kernel, available)
    kernel = _stochastic(kernel, termination, margin, normalise, dtype, available)
    discount, complement = _discount(discount, dtype)
    names = came.names(kernel.n_states, kernel.n_actions)
    initial = initial if names is None else distribution(initial, {name: s for s, name in enumerate(names.states)})
    m = MDP(
        _cast_kernel(kernel, dtype),
        _cast(rewards.expected(reward, kernel, available, came.per_action), dtype),
        discount,
        complement,
        _cast(_initial(initial, kernel.n_states, normalise), dtype),
        None if termination is None else _cast(termination, dtype),
        available=None if available is None else jnp.asarray(available),
        names=names,
    )
    checks.check_batches(_batch_axes(m))
    return m


def _cast(x: Any, dtype: np.dtype) -> Array:
    """One array with an explicit dtype: a weakly typed leaf would retrace."""
    return lax.convert_element_type(x, dtype) if checks.is_traced(x) else jnp.asarray(x.astype(dtype))


def _cast_kernel(kernel: Any, dtype: np.dtype) -> Transitions:
    if isinstance(kernel, Dense):
        return Dense(_cast(kernel.probabilities, dtype))
    if isinstance(kernel, Successors):
        return Successors(_cast(kernel.indices, np.dtype(np.int32)), _cast(kernel.probabilities, dtype))
    return kernel


def _batch_axes(m: MDP) -> dict[str, tuple[int, ...]]:
    some = {"termination": m.termination, "available": m.available}
    return {
        "transitions": m.transitions.batch_shape,
        "reward": m.reward.shape[:-2],
        "discount": m.discount.shape,
        "initial": m.initial.shape[:-1],
        **{name: x.shape[:-2] for name, x in some.items() if x is not None},
    }


# ---- transitions


def _kernel(came: containers.Kernel, layout: str | None, available: Any) -> tuple[Any, tuple[float, str], Any]:
    """A kernel whose arrays are float64 or tracers, entries checked, the tolerance on its rows, and the mask.

    (A mask without a single False is None.)
    """
    kernel, data = _read(came, layout)
    if available is not None:
        available = masks.checked(available, (kernel.n_states, kernel.n_actions))
        available = None if not checks.is_traced(available) and available.all() else available
    return _checked(kernel, available), checks.tolerance(data), available


def _read(came: containers.Kernel, layout: str | None) -> tuple[Any, Any]:
    """A kernel whose arrays are float64 or tracers, of the right shapes, and the data that it was made of."""
    transitions = came.data
    if layout not in (None, "sas", "ass"):
        raise ValueError(f'layout must be "sas" ([S, A, S]) or "ass" ([A, S, S]), got {layout!r}')
    if isinstance(transitions, Dense):
        return _dense(transitions.probabilities, "sas"), transitions.probabilities
    if isinstance(transitions, Successors):
        return _successors(transitions), transitions.probabilities
    if isinstance(transitions, MatrixFree):
        return transitions, None
    if hasattr(transitions, "tocoo"):
        raise ValueError("transitions is one sparse matrix; pass a list with one [S, S] matrix per action")
    if isinstance(transitions, (list, tuple)) and any(hasattr(p, "tocoo") for p in transitions):
        packed: Any = checks.pack_sparse(transitions)
        return _successors(Successors(*packed)), transitions
    return _dense(transitions, "ass" if came.per_action else layout), transitions


def _dense(p: Any, layout: str | None) -> Dense:
    p = checks.number("transitions", p)
    layout = checks.layout_of(p, layout)
    return Dense(p.swapaxes(-3, -2) if layout == "ass" else p)


def _successors(kernel: Successors) -> Successors:
    indices: Any = kernel.indices if checks.is_traced(kernel.indices) else np.asarray(kernel.indices)
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise TypeError(f"transitions.indices has dtype {indices.dtype}; successors are state numbers: use int32")
    if indices.ndim != 3 or 0 in indices.shape:
        raise ValueError(f"transitions.indices has shape {indices.shape}; expected [S, A, K], shared by all lanes")
    p = checks.number("transitions.probabilities", kernel.probabilities)
    checks.expect_shape("transitions.probabilities", p.shape, indices.shape, "S, A, K", "one per entry of indices")
    return Successors(indices, p)


def _checked(kernel: Any, available: Any) -> Any:
    """A kernel without impossible entries; where there is no action, the state stays."""
    if isinstance(kernel, Dense):
        p = masks.fill(kernel.probabilities, available, np.eye(kernel.n_states)[:, None], 3)
        checks.refuse_improper("transitions", p, ("s", "a", "s'"))
        return Dense(p)
    if not isinstance(kernel, Successors):
        return kernel
    n = kernel.n_states
    indices: Any = masks.fill(kernel.indices, available, np.arange(n)[:, None, None], 3)
    if not checks.is_traced(indices):
        rule = f"successors are 0..{n - 1}; pad a row with index 0 and probability 0"
        outside = (indices < 0) | (indices >= n)
        checks.refuse("transitions.indices", indices, outside, ("s", "a", "k"), rule)
    first = np.eye(1, indices.shape[-1])[None]
    p = masks.fill(kernel.probabilities, available, first, 3)
    checks.refuse_improper("transitions.probabilities", p, ("s", "a", "k"))
    return Successors(indices, p)


def _stochastic(kernel: Any, termination: Any, margin: Any, normalise: bool, dtype: Any, available: Any) -> Any:
    """The kernel with rows that sum to `1 - termination` to rounding; refuses rows not close to it."""
    if isinstance(kernel, MatrixFree):
        return function_checks.checked(kernel, termination, normalise, dtype, available)
    p = kernel.probabilities
    if termination is not None:
        checks.check_batches({"transitions": p.shape[:-3], "termination": termination.shape[:-2]})
    if checks.is_traced(p, termination):
        if not normalise:
            return kernel
        p = _cast(p, dtype)
        termination = None if termination is None else _cast(termination, dtype)
        rescaled = _rescaled(jnp, p, p.sum(-1), termination)
    else:
        target = 1.0 if termination is None else 1.0 - termination
        sums = p.sum(-1)
        checks.check_rows(sums, target, termination is not None, margin, normalise)
        if np.size(target) > sums.size and not normalise:
            return kernel  # rows shared by lanes stay shared: within tolerance they meet every lane's target
        rescaled = _rescaled(np, p, sums, termination)
    return Dense(rescaled) if isinstance(kernel, Dense) else Successors(kernel.indices, rescaled)


def _rescaled(xp: Any, p: Any, sums: Any, termination: Any) -> Any:
    factor = 1.0 / xp.where(sums > 0, sums, 1.0)
    if termination is not None:
        factor, termination = xp.broadcast_arrays(factor, termination)
        factor = factor * (1.0 - termination)
    factor = factor[..., None]
    return p.reshape((1,) * (factor.ndim - p.ndim) + p.shape) * factor


# ---- reward, termination, initial, discount


def _termination(termination: Any, kernel: Any, available: Any) -> Any:
    if termination is None:
        return None
    margin, _ = checks.tolerance(termination)
    termination = checks.number("termination", termination)
    core = (kernel.n_states, kernel.n_actions)
    if termination.shape == core[:1]:
        termination = termination[:, None] + np.zeros((1, core[1]), termination.dtype)
    checks.expect_shape("termination", termination.shape, core, "S, A", "one probability per (s, a), or [S]")
    termination = masks.fill(termination, available, [[0.0]])
    if checks.is_traced(termination):
        return termination
    checks.refuse_improper("termination", termination, ("s", "a"))
    above = termination > 1 + margin
    checks.refuse("termination", termination, above, ("s", "a"), "a probability is at most 1; clip or correct it")
    return np.minimum(termination, 1.0) if termination.any() else None


def _initial(initial: Any, n_states: int, normalise: bool) -> Any:
    if initial is None:
        return np.full((n_states,), 1.0 / n_states)
    margin, said = checks.tolerance(initial)
    initial = checks.number("initial", initial)
    checks.expect_shape("initial", initial.shape, (n_states,), "S", "a distribution over states, or None for uniform")
    traced = checks.is_traced(initial)
    if traced and not normalise:
        return initial
    sums = initial.sum(-1)
    if not traced:
        checks.refuse_improper("initial", initial, ("s",))
        bad = sums <= 0 if normalise else np.abs(sums - 1) > margin
        lane = checks.first(bad)
        if lane is not None:
            total = f"{checks.place('initial', lane, ())} sums to {checks.show(sums[lane], 1.0)}"
            raise ValueError(f"{total}, not 1 ({said}); divide by the sum, or pass normalise=True")
    return initial / sums[..., None]


def _discount(discount: Any, dtype: np.dtype) -> tuple[Array, Array]:
    """The discount and its complement, the latter from double precision where the discount has it."""
    g = checks.number("discount", discount)
    if checks.is_traced(g):
        g = _cast(g, dtype)
        return g, 1 - g
    rule = "it must lie in [0, 1): use 0.999 for a long horizon, and termination for episodes that end"
    checks.refuse("discount", g, ~((g >= 0) & (g < 1)), (), rule)
    rule = f"in {dtype} that is 1: pass float64 arrays with jax_enable_x64 on, or a smaller discount"
    checks.refuse("discount", g, g.astype(dtype) >= 1, (), rule)
    return _cast(g, dtype), _cast(1.0 - g, dtype)
