r"""What a fixed policy is guaranteed when the reward it meets is not the one it was made for.

Whatever the policy, with d its discounted visits, Omega the regulariser and `dr = r - deployed`,

    return(r - dr)  >=  return(r) - sum_s d Omega(p)  -  sum_s d(s) Omega*(dr(s, .)),

by the inequality of Fenchel and Young state by state [Brekelmans et al. 2022, prop. 1]. The last sum is negative (a
bonus) where dr is in the robust set on average over visits, which is all that the guarantee needs, and a forfeit
outside. Equality holds where dr is the policy's worst case plus any constant per state.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from robustreg._core import checks, pytrees
from robustreg.problems.mdps import MDP
from robustreg.regularisers.bound import maximise
from robustreg.regularisers.regulariser import Regulariser
from robustreg.solvers import bound_problem
from robustreg.solvers.evaluation import evaluate, occupancy


@pytrees.dataclass
class Guarantee:
    """Hold what a fixed policy is guaranteed and what it gets under a deployed reward. Returns are `<initial, value>`.

    Attributes:
        guaranteed: regularised return, `[*B]`: no deployed reward in the robust set gives less.
        actual: return under the deployed reward, `[*B]`.
        slack: how far inside the robust set the change of reward lies, per state, `[*B, S]`; see `adversary.slack`.
        total_slack: the same summed over discounted visits, `[*B]`, in units of return.
    """

    guaranteed: Array
    actual: Array
    slack: Array
    total_slack: Array

    @property
    def bound(self) -> Array:
        """Lower bound on `actual` for every deployed reward, in the robust set or not, `[*B]` [Fenchel and Young]."""
        return self.guaranteed + self.total_slack

    @property
    def margin(self) -> Array:
        """`actual - guaranteed`, `[*B]`; not negative where the deployed reward is `covered`."""
        return self.actual - self.guaranteed

    @property
    def covered(self) -> Array:
        """Whether the deployed reward is in the policy's aggregated robust set, `[*B]`: to rounding."""
        # On the boundary rounding decides.
        unit = 64 * float(jnp.finfo(self.actual.dtype).eps)
        promised = jnp.where(jnp.isfinite(self.guaranteed), jnp.abs(self.guaranteed), 0)
        return self.total_slack >= -unit * (promised + jnp.abs(self.actual))


def guarantee(mdp: MDP, reg: Regulariser, policy: ArrayLike, deployed: ArrayLike | None = None) -> Guarantee:
    """Bound what a fixed policy earns, and compute what it does, where the reward it meets is not the MDP's.

    Args:
        mdp: the MDP with the reward that the policy was made for.
        reg: the regulariser, whose robust set the guarantee is about.
        policy: `[*B, S, A]`, optimal or not.
        deployed: the reward that the policy meets, `[*B, S, A]`; None: the MDP's own.

    Batch axes of all four broadcast as in NumPy.

    Returns:
        A `Guarantee`. `actual >= bound` always, to rounding; `actual >= guaranteed` where `covered`.

    Raises:
        TypeError: a first or second argument of another kind.
        ValueError: a policy or reward of another shape, a policy that is no distribution over actions.
    """
    checks.expect_type(mdp, MDP, "first argument", "mdp")
    checks.expect_type(reg, Regulariser, "second argument", "kl")
    mdp = mdp._canonical()
    reward = mdp.reward if deployed is None else checks.array("deployed", deployed, mdp.dtype)
    checks.expect_shape("deployed", reward.shape, (mdp.n_states, mdp.n_actions), "S, A")
    n = max(mdp.reward.ndim, reward.ndim)
    room = _slack(mdp, reg, _pad(mdp.reward, n) - _pad(reward, n))
    total = _over_visits(_visits(mdp, policy), room)
    guaranteed = _start(mdp, evaluate(mdp, policy, reg=reg))
    actual = _start(mdp, evaluate(mdp, policy, reward=reward))
    shape = jnp.broadcast_shapes(guaranteed.shape, actual.shape, total.shape)
    guaranteed, actual, total = (jnp.broadcast_to(x, shape) for x in (guaranteed, actual, total))
    return Guarantee(guaranteed, actual, room, total)


def aggregated_slack(
    mdp: MDP,
    reg: Regulariser,
    policy: ArrayLike | None,
    perturbation: ArrayLike,
    *,
    visits: ArrayLike | None = None,
) -> Array:
    """Measure how far inside a policy's aggregated robust set a perturbation lies.

    Args:
        mdp, policy: whose discounted visits weigh the states; `policy` is `[*B, S, A]`, or None beside `visits`.
        reg: the regulariser.
        perturbation: `dr`, `[*B, S, A]`, subtracted from the reward.
        visits: in the place of the policy its discounted visits of states, `[*B, S]`, where they are known
            (`Solution.visits`); None: they are solved for.

    Batch axes of all five broadcast as in NumPy.

    Returns:
        `-sum_s d(s) Omega*(dr(s, .))`, `[*B]`, in units of return. The set is where this is >= 0; it holds the robust
        set, and the policy's guarantee holds in all of it.

    Raises:
        TypeError: a first or second argument of another kind.
        ValueError: an argument of another shape, a policy that is none; both or neither of policy and visits.
    """
    checks.expect_type(mdp, MDP, "first argument", "mdp")
    checks.expect_type(reg, Regulariser, "second argument", "kl")
    dr = checks.array("perturbation", perturbation, mdp.dtype)
    checks.expect_shape("perturbation", dr.shape, (mdp.n_states, mdp.n_actions), "S, A")
    if (policy is None) == (visits is None):
        raise ValueError("give the policy, or visits= of states that are known already, and None for the other")
    room = _slack(mdp, reg, dr)
    if visits is None:
        return _over_visits(_visits(mdp, policy), room)
    visits = checks.array("visits", visits, mdp.dtype)
    checks.check_weights("visits", visits, mdp.n_states)
    checks.check_batches({"visits": visits.shape[:-1], "regulariser and perturbation": room.shape[:-1]})
    return _over_visits(visits, room)


@jax.jit
def _slack(mdp: MDP, reg: Regulariser, dr: Array) -> Array:
    """`-Omega*(dr)` per state, `[*B, S]`, to rounding of dr also for a small beta; batch axes as in `solve`."""
    problem = bound_problem.bind(mdp, reg, dr.shape[:-2])
    x = pytrees.lanes_last(dr, len(problem.batch), 2)
    x = jnp.broadcast_to(x, x.shape[:2] + problem.batch)
    return pytrees.batch_first(-maximise(problem.regulariser.by_rows(), x)[0], 1)


def _visits(mdp: MDP, policy: Any) -> Array:
    """A policy's discounted visits of states, `[*B, S]`."""
    return jnp.sum(occupancy(mdp, policy), axis=-1)


def _over_visits(visits: Array, room: Array) -> Array:
    """The sum over discounted visits, `[*B]`."""
    n = max(visits.ndim, room.ndim)
    visits, room = _pad(visits, n), _pad(room, n)
    # What is infinite where nobody goes counts for nothing.
    silent = (visits == 0) & ~jnp.isfinite(room)
    return jnp.sum(visits * jnp.where(silent, 0, room), axis=-1)


def _start(mdp: MDP, value: Array) -> Array:
    """`<initial, value>`, `[*B]`."""
    n = max(mdp.initial.ndim, value.ndim)
    return jnp.sum(_pad(mdp.initial, n) * _pad(value, n), axis=-1)


def _pad(x: Array, ndim: int) -> Array:
    """Axes of 1 in front, up to `ndim`."""
    return x.reshape((1,) * (ndim - x.ndim) + x.shape)
