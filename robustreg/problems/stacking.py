"""Many problems of different sizes as one batch.

Lanes of a batch have one number of states and one of actions. A smaller problem is padded so that nothing about it
changes: a state that is added is a copy of its first one, in which no episode starts and to which nothing leads (so
that it has that state's value, and no residual of its own), an action that is added exists in no state (`available`).
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from robustreg._core import checks
from robustreg.problems.dense import Dense
from robustreg.problems.mdps import MDP
from robustreg.problems.successors import Successors, written_out
from robustreg.problems.transitions import Transitions
from robustreg.regularisers.families import KL, Alpha
from robustreg.regularisers.regulariser import Regulariser, Sum


class Stack(NamedTuple):
    """A batch of problems that may differ in size.

    Attributes:
        mdp: of one batch axis `[N]`, padded to the largest sizes.
        reg: likewise.
        sizes: `(S, A)` of every problem.
    """

    mdp: MDP
    reg: Any
    sizes: tuple[tuple[int, int], ...]

    def cut(self, x: Any) -> list[Any]:
        """Cut results back to the sizes of the problems.

        Args:
            x: a `Solution`, or any pytree of arrays `[N]`, `[N, S]` or `[N, S, A]`.

        Returns:
            One for each problem, without the batch axis and the padding.

        Raises:
            ValueError: an array whose first axis is not that of the problems.
        """
        for leaf in jax.tree.leaves(x):
            if np.ndim(leaf) == 0 or np.ndim(leaf) > 3 or np.shape(leaf)[0] != len(self.sizes):
                got = f"an array of shape {list(np.shape(leaf))}"
                raise ValueError(f"cut takes arrays [N], [N, S] or [N, S, A] with N = {len(self.sizes)}, got {got}")

        def piece(i: int) -> Any:
            return jax.tree.map(lambda leaf: leaf[(i, *map(slice, self.sizes[i][: leaf.ndim - 1]))], x)

        return [piece(i) for i in range(len(self.sizes))]


def stack(problems: Sequence[tuple[MDP, Regulariser]]) -> Stack:
    """Stack problems of any sizes to one batch, whose lanes have the answers of each by itself.

        stacked = rr.stack([(m1, reg1), (m2, reg2)])
        first, second = stacked.cut(rr.solve(stacked.mdp, stacked.reg))

    Args:
        problems: pairs of an MDP and a regulariser without batch axes; regularisers of one kind, except that KL goes
            with alpha. Lists of successors stay such where those of all problems together are short, else rows are
            written out.

    Returns:
        A `Stack`: `mdp`, `reg` and `sizes`. Names and grids of the problems are left with them.

    Raises:
        TypeError: something else than pairs; `MatrixFree` transitions; regularisers of different kinds.
        ValueError: no problems; a problem that is a batch itself.
    """
    if not isinstance(problems, Iterable):
        raise TypeError(f"problems must be pairs of an MDP and a regulariser, got {type(problems).__name__}")
    pairs = [_pair(i, pair) for i, pair in enumerate(problems)]
    if not pairs:
        raise ValueError("problems is empty: stack takes at least one pair (mdp, regulariser)")
    mdps, regs = zip(*pairs)
    if {type(reg) for reg in regs} == {KL, Alpha}:
        regs = tuple(_with_order(reg) for reg in regs)
    for i, reg in enumerate(regs):
        if _kind(reg) != _kind(regs[0]):
            kinds = f"{type(regs[0]).__name__} and, of problem {i}, {type(reg).__name__}"
            raise TypeError(f"stack takes regularisers of one kind, got {kinds}; stack those of a kind together")
    dtype = np.result_type(*(m.dtype for m in mdps))
    sizes = tuple((m.n_states, m.n_actions) for m in mdps)
    n_states, n_actions = (max(size) for size in zip(*sizes))
    missing = [_fit(_there(m), n_states, n_actions, False) for m in mdps]
    all_there = all(m.available is None and m.n_actions == n_actions for m in mdps)
    ends = any(m.termination is not None for m in mdps)

    def per_action(leaves: Sequence[Array]) -> Array:
        return jnp.stack([_fit(x.astype(dtype), n_states, n_actions, 0) for x in leaves])

    zeros = (jnp.zeros(size, dtype) for size in sizes)
    none = [m.termination if m.termination is not None else zero for m, zero in zip(mdps, zeros)]
    initial = [jnp.pad(m.initial.astype(dtype), (0, n_states - m.n_states)) for m in mdps]
    return Stack(
        MDP(
            transitions=_kernel([m.transitions for m in mdps], n_states, n_actions, dtype),
            reward=per_action([m.reward for m in mdps]),
            discount=jnp.stack([m.discount.astype(dtype) for m in mdps]),
            complement=jnp.stack([m.complement.astype(dtype) for m in mdps]),
            initial=jnp.stack(initial),
            termination=per_action(none) if ends else None,
            available=None if all_there else jnp.stack(missing),
        ),
        _regulariser(regs, sizes, n_states, n_actions),
        sizes,
    )


def _pair(i: int, pair: Any) -> tuple[MDP, Any]:
    """One problem; refuses what is none, naming it."""
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"problem {i} is {type(pair).__name__}; expected a pair (mdp, regulariser)")
    m, reg = pair
    checks.expect_type(m, MDP, f"first of problem {i}", "mdp")
    checks.expect_type(reg, Regulariser, f"second of problem {i}", "kl")
    if m.batch_shape or reg.batch_shape:
        batch = list(m.batch_shape or reg.batch_shape)
        raise ValueError(f"problem {i} has batch axes {batch} of its own; stack takes single problems: pick its lanes")
    if not isinstance(m.transitions, (Dense, Successors)):
        raise TypeError(f"problem {i} has transitions that are a function, which cannot be padded; solve it by itself")
    return m, reg


def _with_order(reg: Any) -> Any:
    """KL as the alpha-divergence that it is."""
    return Alpha(jnp.ones_like(reg.beta), reg.beta, reg.log_prior, reg.state_scale) if isinstance(reg, KL) else reg


def _there(m: MDP) -> Array:
    return jnp.ones((m.n_states, m.n_actions), bool) if m.available is None else jnp.asarray(m.available)


def _fit(x: Array, n_states: int, n_actions: int, missing: Any) -> Array:
    """`[S, A, ...]` with copies of the first state and `missing` for further actions."""
    rest = [(0, 0)] * (x.ndim - 2)
    x = jnp.pad(x, [(0, 0), (0, n_actions - x.shape[1]), *rest], constant_values=missing)
    return jnp.concatenate([x, jnp.broadcast_to(x[:1], (n_states - x.shape[0], *x.shape[1:]))])


def _kernel(kernels: Sequence[Any], n_states: int, n_actions: int, dtype: Any) -> Transitions:
    """All kernels as one. Actions that are added stay where they are."""
    if all(isinstance(kernel, Successors) for kernel in kernels):
        width = max(kernel.indices.shape[-1] for kernel in kernels)
        lists, chances = [], []
        for kernel in kernels:
            slots = ((0, 0), (0, 0), (0, width - kernel.indices.shape[-1]))
            new = jnp.arange(n_actions) >= kernel.n_actions
            p = _fit(jnp.pad(kernel.probabilities.astype(dtype), slots), n_states, n_actions, 0)
            lists.append(_fit(jnp.pad(jnp.asarray(kernel.indices, jnp.int32), slots), n_states, n_actions, 0))
            chances.append(p.at[..., 0].set(jnp.where(new[None], 1, p[..., 0])))
        return Successors(jnp.stack(lists), jnp.stack(chances))._joined()
    return Dense(jnp.stack([_rows(kernel, n_states, n_actions, dtype) for kernel in kernels]))


def _rows(kernel: Any, n_states: int, n_actions: int, dtype: Any) -> Array:
    """One kernel written out, `[n_states, n_actions, n_states]`."""
    if isinstance(kernel, Successors):
        p = written_out(kernel.indices[None], kernel.probabilities[None])[0]
    else:
        p = kernel.probabilities
    p = jnp.pad(p.astype(dtype), ((0, 0), (0, 0), (0, n_states - kernel.n_states)))
    p = _fit(p, n_states, n_actions, 0)
    return p.at[:, kernel.n_actions :, 0].set(1)


def _kind(reg: Any) -> tuple[Any, ...]:
    """Tell the kind of a regulariser: its class, what of it is no leaf, and its parts."""
    fixed = [getattr(reg, f.name) for f in dataclasses.fields(reg) if f.metadata.get("static")]
    return type(reg), *fixed, *(_kind(part) for part in getattr(reg, "parts", ()))


def _regulariser(regs: Sequence[Any], sizes: Sequence[tuple[int, int]], n_states: int, n_actions: int) -> Any:
    """All regularisers as one, with a beta per lane and, where any has them, a scale and a prior per lane and state."""
    if isinstance(regs[0], Sum):
        parts = zip(*(reg.parts for reg in regs))
        return Sum(tuple(_regulariser(part, sizes, n_states, n_actions) for part in parts), regs[0].shared)
    leaves = {name: jnp.stack([getattr(reg, name) for reg in regs]) for name in regs[0]._scalars}
    dtype = next(iter(leaves.values())).dtype
    if any(reg.state_scale is not None for reg in regs):
        scales = [jnp.ones(1, dtype) if reg.state_scale is None else reg.state_scale for reg in regs]
        wide = [jnp.broadcast_to(x, (s,)) if x.shape == (1,) else x for x, (s, _) in zip(scales, sizes)]
        leaves["state_scale"] = jnp.stack([_fit(x[:, None], n_states, 1, 0)[:, 0] for x in wide])
    if any(getattr(reg, "alpha_per_state", None) is not None for reg in regs):
        raise ValueError("stack does not take alpha_per_state: stack the problems by order, or solve them one by one")
    if any(reg.log_prior is not None for reg in regs):
        leaves["log_prior"] = jnp.stack(
            [_fit(_logs(reg, *size, dtype), n_states, n_actions, -jnp.inf) for reg, size in zip(regs, sizes)]
        )
    return dataclasses.replace(regs[0], **leaves)


def _logs(reg: Any, n_states: int, n_actions: int, dtype: Any) -> Array:
    """The logarithm of a prior, `[S, A]`, also of one that is uniform and not written down."""
    logs = reg.log_prior
    if logs is None:
        logs = jnp.full((n_actions,), -np.log(n_actions) if reg.has_reference else 0.0, dtype)
    return jnp.broadcast_to(logs[None] if logs.ndim == 1 else logs, (n_states, n_actions))
