"""What tells one sweep from another: two runs share a folder if, and only if, they have the same digest."""

import hashlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robustreg.problems.matrix_free import MatrixFree
from robustreg.sweeps.plan import Plan, hash_of

# Where an object lies is another in every process. (Functions of a matrix-free kernel are known by their names.)
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
# Where a class of ours is defined may change from release to release, and a folder is still the same sweep.
_HOME = re.compile(r"<class 'robustreg\.(?:\w+\.)*(\w+)'>")


def digest(plan: Plan, options: tuple) -> dict[str, Any]:
    """Everything that results depend on but for the layout, as JSON: what two runs must share to share a folder."""
    held: Any = (plan.mdp, plan.reg) if plan.ball is None else (plan.mdp, plan.reg, plan.ball)
    leaves, structure = jax.tree.flatten(held)
    solver, tol, max_steps = options
    return {
        "data": hash_of(*leaves, *plan.values.values()),
        "structure": hashlib.sha256(_lasting(str(structure)).encode()).hexdigest(),
        "grid": {name: list(x.shape) for name, x in plan.values.items()},
        "zipped": plan.zipped,
        "outputs": list(plan.outputs),
        "solver": repr(solver),
        "tol": None if tol is None else float(tol),
        "max_steps": max_steps,
        "dtype": str(plan.mdp.dtype),
        "kernel": _probed(plan.mdp.transitions),
    }


def _lasting(structure: str) -> str:
    """The text of a tree's structure without what differs between processes and between releases."""
    return _HOME.sub(r"\1", _ADDRESS.sub("", structure))


def _probed(kernel: Any) -> list[float]:
    """Tell what a matrix-free kernel does, in two numbers: the arrays that its function closes over are no leaves."""
    if not isinstance(kernel, MatrixFree):
        return []
    ahead = np.asarray(kernel.expect(jnp.cos(jnp.arange(kernel.n_states))), np.float64).ravel()
    return [float(ahead.sum()), float(ahead @ np.sin(np.arange(ahead.size)))]
