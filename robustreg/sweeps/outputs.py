"""What a sweep can report of a cell: names, and how each is computed from the solution, on the device."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from robustreg.problems.mdps import MDP
from robustreg.regularisers.regulariser import Regulariser
from robustreg.solvers import evaluation
from robustreg.solvers.solution import Solution


@dataclasses.dataclass(frozen=True)
class Cell:
    """Hold what is known of cells, side by side, once they are solved; what costs more is computed once, if asked for.

    Attributes:
        mdp, solution: of the cells.
        optimum: value of the start without a regulariser, `[*b]`, or None where no output asks for it. Beta does not
            change it.
        visited: whether some output asks for visits. They cost three times as much as a value, and are enough for all.
        guess: of the policies' values by the reward of the problem, `[*b, S]`.
        tol: error to which cells were solved, and those values are known; None: as small as the precision supports.
    """

    mdp: MDP
    solution: Solution
    optimum: jax.Array | None
    visited: bool
    guess: jax.Array
    tol: jax.Array | None

    @functools.cached_property
    def visits(self) -> jax.Array:
        """Compute the policy's discounted visits `[*b, S, A]`: every return of it is an inner product with them."""
        return evaluation.occupancy(self.mdp, self.solution.policy)

    def earned(self, reward: jax.Array) -> jax.Array:
        """Return the policy's return by a reward `[*b, S, A]`."""
        reward = jnp.broadcast_to(reward, self.visits.shape)
        return jnp.sum(jnp.where(self.visits == 0, 0, self.visits * reward), axis=(-2, -1))

    @functools.cached_property
    def nominal_return(self) -> jax.Array:
        """Return the policy's return by the reward of the problem, `[*b]`."""
        if self.visited:
            return self.earned(self.mdp.reward)
        return from_start(self.mdp, self.nominal)

    @functools.cached_property
    def nominal(self) -> jax.Array:
        """Return the policy's value by the reward of the problem, `[*b, S]`."""
        return evaluation.evaluate_from(self.mdp, self.solution.policy, self.guess, self.tol)

    def worst_case_return(self) -> jax.Array:
        """Return the policy's return by the reward less its worst perturbation, `[*b]`."""
        dr = self.solution.perturbation
        return self.earned(jnp.broadcast_to(self.mdp.reward, dr.shape) - dr)

    def entropy(self) -> jax.Array:
        """Return, of the policy, in nats, over the states as it visits them."""
        policy, states = self.solution.policy, jnp.sum(self.visits, axis=-1)
        each = -jnp.sum(policy * jnp.log(jnp.where(policy > 0, policy, 1)), axis=-1)
        return jnp.sum(states * each, axis=-1) / jnp.sum(states, axis=-1)

    def price(self) -> jax.Array:
        """Tell how much less than the best policy this one earns, `[*b]`."""
        assert self.optimum is not None
        return self.optimum - self.nominal_return


class Output(NamedTuple):
    """A column that a sweep can put into its table.

    Attributes:
        compute: from the cells of a chunk, on the device, `[lanes, ...]`.
        meaning: what it is, its unit and the axes that it adds.
        nominal: whether the policy's return by the reward of the problem is needed.
        visited: whether its visits are.
        axes: that it adds to those of the table, "S" for states and "A" for actions.
    """

    compute: Callable[[Cell], jax.Array]
    meaning: str
    nominal: bool = False
    visited: bool = False
    axes: str = ""


OUTPUTS: dict[str, Output] = {
    "objective": Output(
        lambda cell: cell.solution.objective,
        "what the policy guarantees: the regularised value of the start, in reward units",
    ),
    "nominal_return": Output(
        lambda cell: cell.nominal_return, "what the policy earns undisturbed, in reward units", nominal=True
    ),
    "regulariser_cost": Output(
        lambda cell: cell.nominal_return - cell.solution.objective,
        "nominal_return - objective: the discounted cost of the regulariser, in reward units",
        nominal=True,
    ),
    "price_of_robustness": Output(
        Cell.price,
        "what the best unregularised policy earns on top of nominal_return, in reward units",
        nominal=True,
    ),
    "worst_case_return": Output(
        Cell.worst_case_return,
        "what the policy earns under its worst perturbation: objective, by another way",
        visited=True,
    ),
    "policy_entropy": Output(
        Cell.entropy, "of the policy, in nats, averaged over the states as it visits them", visited=True
    ),
    "gap": Output(
        lambda cell: cell.solution.gap,
        "certified width of the interval around the value: largest over states, in reward units",
    ),
    "steps": Output(lambda cell: cell.solution.steps, "iterations of the solver"),
    "status": Output(lambda cell: cell.solution.status, "code of rr.Status: 0 is CONVERGED"),
    "value": Output(
        lambda cell: cell.solution.value, "regularised value of every state [S], in reward units", axes="S"
    ),
    "policy": Output(lambda cell: cell.solution.policy, "probability of every action in every state [S, A]", axes="SA"),
    "perturbation": Output(
        lambda cell: cell.solution.perturbation,
        "the adversary's worst case [S, A], subtracted from the reward",
        axes="SA",
    ),
    "occupancy": Output(
        lambda cell: cell.visits,
        "discounted visits of every state and action [S, A]; they sum to 1/(1 - discount) if no episode ends",
        visited=True,
        axes="SA",
    ),
}
OUTPUTS_BY_DEFAULT = ("objective", "gap", "steps", "status")


def best_return(mdp: MDP, reg: Regulariser) -> jax.Array:
    """Compute the value of the start under the best policy that the prior allows, `[*b]`."""
    return from_start(mdp, evaluation.nominal_optimum(mdp, reg))


def from_start(mdp: MDP, value: jax.Array) -> jax.Array:
    """Mean of a value `[*b, S]` over the start, `[*b]`."""
    return jnp.einsum("...s,...s->...", mdp.initial, value, precision=jax.lax.Precision.HIGHEST)
