"""The plan of a sweep: cells, the order in which they are solved, and the problem that a chunk of them stands for.

A cell is one combination of grid values. Cells that differ in beta alone are a *line*, along which the value is smooth:
a lane of the kernels goes along a *path*, a part of a line (or some short lines one after the other) with beta rising,
and starts every cell from what the last few say of it. A chunk is as many paths side by side as work fastest together
(cache-sized on a CPU), of the same betas and much the same discount where there are enough of them, so that nobody
waits long for the slowest. Chunks and the memory do not grow with the sweep beyond what the device bounds, and they do
not depend on how many devices or processes share the work: every cell is computed in the same company wherever it is
computed.
"""

import dataclasses
import functools
import hashlib
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robustreg._core import checks
from robustreg.problems.mdps import MDP
from robustreg.problems.mdps import mdp as make_mdp
from robustreg.problems.successors import Successors
from robustreg.regularisers import balls, parameters
from robustreg.regularisers import families as regs
from robustreg.regularisers.regulariser import Regulariser
from robustreg.solvers import ambiguity
from robustreg.solvers.ambiguity import TransitionBall
from robustreg.sweeps.outputs import OUTPUTS

MDP_LEAVES = ("discount", "reward", "initial")
# Cells of a path, at least (on a CPU) and at most. The first cells of a path have no predecessors to start from, so
# short paths gain little; of a long one that is interrupted all cells are lost.
_SHORTEST, _LONGEST = 32, 64
# A sweep is cut into at least so many chunks, for cores, devices and hosts to share; only with more cells do paths
# grow longer and, on an accelerator, chunks wider. (With five, one of two cores would wait for the last.)
_CHUNKS = 8
# Bytes of a vector [S, paths] that keep an accelerator busy: with fewer paths its steps take nearly as long.
_BUSY = 2**22
# Bytes that array outputs of a chunk may take on a CPU.
_ROOM = 2**28
# Cells of one sweep: their numbers alone take a gigabyte.
_MOST = 2**27


@dataclasses.dataclass(frozen=True)
class Plan:
    """Cells by the paths on which they are solved, and the arrays that they pick from.

    Attributes:
        paths: `[n, length]`, flat numbers of cells in the order in which a lane solves them; -1 where there is none.
        line: cells of a line.
        length: cells of a path as they were asked for; `paths` has about as many.
        width: paths of a chunk.
    """

    mdp: MDP
    reg: Regulariser
    ball: TransitionBall | None
    values: Mapping[str, np.ndarray]
    coordinates: Mapping[str, np.ndarray]
    outputs: tuple[str, ...]
    zipped: bool
    shape: tuple[int, ...]
    paths: np.ndarray
    line: int
    length: int
    width: int

    @property
    def size(self) -> int:
        """Cells in all."""
        return int(np.prod(self.shape))

    @property
    def n_chunks(self) -> int:
        """Chunks in all."""
        return -(-len(self.paths) // self.width)

    @property
    def begins(self) -> np.ndarray:
        """Whether a line begins at this place of a path, `[length]`."""
        return np.arange(self.paths.shape[1]) % self.line == 0

    def layout(self, job: int) -> np.ndarray:
        """Flat numbers of the cells of a chunk, `[length, width]`; -1 where there is none."""
        paths = self.paths[job * self.width : (job + 1) * self.width]
        return np.pad(paths, ((0, self.width - len(paths)), (0, 0)), constant_values=-1).T

    def cells(self, job: int) -> np.ndarray:
        """Flat numbers of the cells of a chunk, one after the other."""
        layout = self.layout(job)
        return layout[layout >= 0]

    def lanes(self, job: int) -> dict[str, np.ndarray]:
        """Grid values of a chunk, `[length, width, ...]`, in the working precision."""
        cells = _filled(self.layout(job), self.begins)
        index = [cells] * len(self.values) if self.zipped else np.unravel_index(cells, self.shape)
        picked = {name: x[i] for (name, x), i in zip(self.values.items(), index)}
        if "discount" in picked:
            picked["complement"] = 1 - picked["discount"]  # before the precision of either is lost
        return {name: x.astype(np.int32 if name == "mdp" else self.mdp.dtype) for name, x in picked.items()}


def _filled(layout: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """With some cell in the place of every -1, one that costs its lane as little as may be."""
    layout = layout.copy()
    for i, row in enumerate(layout):
        # Padding repeats the first lane where paths begin, and elsewhere the cell that its own lane had last.
        none = row < 0
        row[none] = row[0] if begins[i] and row[0] >= 0 else layout[i - 1][none]
    return layout


def make_plan(
    mdp: MDP,
    reg: Regulariser,
    grid: Any,
    outputs: Sequence[str],
    zipped: bool,
    chunk: int | None,
    devices: Any,
    ball: TransitionBall | None = None,
) -> Plan:
    """Check a grid and lay it out; arguments as in `robustreg.sweep`, with the devices that it may run on.

    Raises:
        ValueError: for names, shapes and values that do not fit.
    """
    values = {name: _axis(name, x, mdp, reg, ball) for name, x in dict(grid).items()}
    if reg.batch_shape or (ball is not None and ball.batch_shape) or len(mdp.batch_shape) > 1:
        raise ValueError("the problem of a sweep has no batch axes, but for one of the MDP: put them into the grid")
    if mdp.batch_shape:
        values = {"mdp": np.arange(mdp.batch_shape[0])} | values
    if not values or any(len(x) == 0 for x in values.values()):
        raise ValueError("the grid is empty: give at least one leaf with at least one value")
    lengths = {name: len(x) for name, x in values.items()}
    if zipped and len(set(lengths.values())) > 1:
        raise ValueError(f"zipped axes must be equally long, got {lengths}")
    shape = (next(iter(lengths.values())),) if zipped else tuple(lengths.values())
    if math.prod(shape) > _MOST:
        raise ValueError(f"the grid has {math.prod(shape):,} cells; one sweep has at most {_MOST:,}: take several")
    coordinates = {n: x if x.ndim == 1 else np.arange(len(x)) for n, x in values.items()}
    lines = _lines(values, zipped, shape)
    fewest, widest, chunks, length = _sizes(mdp, lines.size, lines.shape[1], outputs, chunk, devices)
    paths = _paths(_keys(coordinates, lines, zipped, shape), lines, length)
    width = int(np.clip(-(-len(paths) // chunks), fewest, min(widest, len(paths))))
    width = -(-len(paths) // -(-len(paths) // width))  # as many in the last chunk as in the others
    where = paths, lines.shape[1], length, width
    return Plan(mdp, reg, ball, values, coordinates, tuple(outputs), zipped, shape, *where)


def checked_part(part: Any, name: str = "part") -> tuple[int, int] | None:
    """Read which part of the chunks is meant, (i, n), as two integers."""
    if part is None:
        return None
    try:
        i, n = map(operator.index, part)
    except (TypeError, ValueError):
        i = n = -1
    if n == -1 or any(isinstance(x, bool) for x in part):
        raise TypeError(f"{name} must be (i, n), the i-th of n parts, got {part!r}")
    if not 0 <= i < n:
        raise ValueError(f"{name} must be (i, n) with 0 <= i < n, got ({i}, {n})")
    return i, n


def relaid(plan: Plan, layout: Mapping[str, Any]) -> Plan:
    """Lay the same cells out anew: as a folder was begun, perhaps by another device.

    Args:
        plan: of these devices.
        layout: as `layout_of` tells it.

    Raises:
        ValueError: what is no layout of these cells.
    """
    lines = _lines(plan.values, plan.zipped, plan.shape)
    length, width = (layout.get(name) for name in ("length", "width"))
    if not all(isinstance(n, int) and 1 <= n <= lines.size for n in (length, width)):
        raise ValueError(f"length {length} and width {width} are no layout of {lines.size} cells")
    assert isinstance(length, int) and isinstance(width, int)
    paths = _paths(_keys(plan.coordinates, lines, plan.zipped, plan.shape), lines, length)
    new = dataclasses.replace(plan, paths=paths, length=length, width=width)
    if layout_of(new) != layout:
        raise ValueError("its cells are in an order that this version of robustreg does not know")
    return new


def layout_of(plan: Plan) -> dict[str, Any]:
    """Tell which cells are solved together, as JSON: results depend on it in their last digits."""
    return {"length": plan.length, "width": plan.width, "paths": hash_of(plan.paths)}


def _lines(values: Mapping[str, np.ndarray], zipped: bool, shape: tuple[int, ...]) -> np.ndarray:
    """Flat numbers of cells, `[n, line]`, along beta where it is an axis by itself."""
    lines = np.arange(int(np.prod(shape)))[:, None]
    if "beta" in values and (not zipped or len(values) == 1):
        lines = np.moveaxis(lines.reshape(shape), list(values).index("beta"), -1).reshape(-1, len(values["beta"]))
        lines = lines[:, np.argsort(values["beta"], kind="stable")]
    return lines


def _keys(
    coordinates: Mapping[str, np.ndarray], lines: np.ndarray, zipped: bool, shape: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """Coordinates of every line, those of its first cell."""
    first = lines[:, 0]
    index = [first] * len(coordinates) if zipped else np.unravel_index(first, shape)
    return {name: x[i] for (name, x), i in zip(coordinates.items(), index)}


def _sizes(
    mdp: MDP, size: int, line: int, outputs: Sequence[str], chunk: int | None, devices: Any
) -> tuple[int, int, int, int]:
    """Paths of a chunk at least and at most, chunks at least, and cells of a path.

    Args:
        mdp: the problem.
        size, line: cells in all, and of a line.
        outputs, chunk, devices: as in `make_plan`. With a chunk, devices have no say: parts of a sweep can then be made
            on unlike machines.
    """
    # Any device may get any chunk, so that each must be able to hold it.
    widest = chunk or min(device_width(mdp, device) for device in devices)
    if chunk or all(device.platform == "cpu" for device in devices):
        fewest, usual, shortest, chunks, room = 1, widest, _SHORTEST, _CHUNKS // 2, _ROOM
    else:
        fewest = usual = int(np.clip(_BUSY // (mdp.n_states * mdp.dtype.itemsize), 1, widest))
        # Steps of a path come one after the other: all cells at once, if they are few.
        shortest, chunks = min(-(-size // usual), _SHORTEST // 2), _CHUNKS
        room = min(_memory(device) for device in devices) // 10
    length = int(np.clip(-(-size // (_CHUNKS * usual)), min(shortest, line), _LONGEST))
    # Array outputs of a chunk are on the device until it is done.
    entries = sum({"": 0, "S": 1, "SA": mdp.n_actions}[OUTPUTS[name].axes] for name in outputs)
    most = max(1, int(room // max(1, entries * mdp.n_states * mdp.dtype.itemsize)))
    widest = min(widest, most)
    return min(fewest, widest), widest, chunks, min(length, max(1, most // widest))


def _paths(keys: Mapping[str, np.ndarray], lines: np.ndarray, length: int) -> np.ndarray:
    """Paths of about as many cells as asked for, `[n, length]`, those next to each other about as hard; see `Plan`.

    Args:
        keys: coordinates of every line.
        lines: `[n, line]`, cells.
        length: cells of a path.
    """
    # The last key sorts first: discount before alpha, and one MDP after the other within those.
    ranked = [keys[n] for n in ("mdp", "beta", "alpha", "discount") if n in keys]
    order = np.lexsort(ranked) if ranked else np.arange(len(lines))
    lines = lines[order]
    if lines.shape[1] <= length:
        # Some lines one after the other. The first lines of all paths are neighbours, and so are the second.
        n = -(-len(lines) // (length // lines.shape[1]))
        each = -(-len(lines) // n)
        padded = np.pad(lines, ((0, each * n - len(lines)), (0, 0)), constant_values=-1)
        return padded.reshape(each, n, -1).swapaxes(0, 1).reshape(n, -1)
    # Parts of lines: the first parts of all are neighbours, and so are the second, unless discounts are far apart.
    parts = np.array_split(np.arange(lines.shape[1]), -(-lines.shape[1] // length))
    padded = np.full((len(parts), len(lines), len(parts[0])), -1)
    for row, part in zip(padded, parts):
        row[:, : len(part)] = lines[:, part]
    horizon = -np.log2(np.maximum(1 - keys["discount"][order] if "discount" in keys else np.ones(len(lines)), 1e-18))
    by = np.lexsort((np.repeat(np.arange(len(parts)), len(lines)), np.tile(np.floor(horizon), len(parts))))
    return padded.reshape(-1, len(parts[0]))[by]


def _axis(name: str, x: Any, mdp: MDP, reg: Regulariser, ball: TransitionBall | None) -> np.ndarray:
    """Values of one leaf `[n, ...]`, checked by the factory that makes it."""
    own = reg._scalars  # (Parts of a sum, and what stands for none, have no leaves of one name.)
    shared = ("state_scale", *(("prior",) if reg.has_reference else ())) if own else ()
    allowed = MDP_LEAVES + tuple(sorted((*own, *shared))) + (() if ball is None else ("ambiguity",))
    if name not in allowed:
        raise ValueError(f"unknown leaf {name!r} in the grid; there are: {', '.join(allowed)}")
    values = checks.number(name, x)
    core = {"reward": (2,), "initial": (1,), "state_scale": (1,), "prior": (1, 2)}.get(name, (0,))
    if values.ndim - 1 not in core:
        raise ValueError(f"{name} has shape {values.shape} in the grid; expected one leading axis of values")
    if not values.size:
        return values
    if name in MDP_LEAVES:
        _check_mdp(name, values if name != "initial" else x, mdp)
    elif ball is not None and name == "ambiguity":
        ambiguity.checked(dataclasses.replace(ball, radius=values), mdp)
    elif name in own:
        checked: Any = {"alpha": parameters.order, "beta": functools.partial(parameters.strength, "beta")}
        checked.get(name, {"radius": balls.norm_ball}.get(name, functools.partial(parameters.number, name)))(x)
    else:
        regs.kl(1.0, **{name: x})
    if name == "prior":
        # What its own dtype explains is divided out before that is forgotten: in chunks it has another.
        values = values / values.sum(-1, keepdims=True)
    return values


def _check_mdp(name: str, x: Any, mdp: MDP) -> None:
    """Have the factory look at a leaf, beside transitions of the right size that cost it nothing to check."""
    n_states, n_actions = mdp.n_states, mdp.n_actions
    lists: Any = np.zeros((n_states, n_actions, 1), np.int32), np.ones((n_states, n_actions, 1))
    leaves: dict[str, Any] = {"reward": np.zeros((n_states, n_actions), mdp.dtype), "discount": 0.0}
    if name == "discount" and mdp.termination is not None and np.any(np.asarray(x) == 1):
        mdp.replace(discount=1.0)  # refuses what never ends
        lists, leaves["termination"] = (lists[0], 0 * lists[1]), np.ones((n_states, n_actions))
    if name == "reward" and mdp.available is not None:
        # What an MDP of the batch does not look at, another may.
        leaves["available"] = np.asarray(mdp.available).any(tuple(range(mdp.available.ndim - 2)))
    # Were there S values, and S = A, they could be rewards by successor; in a grid they are not.
    leaves[name] = x[:, None] if name == "reward" and x.shape == (n_states, n_actions, n_states) else x
    make_mdp(Successors(*lists), **leaves)


def device_width(mdp: MDP, device: Any) -> int:
    """Lanes solved together on a device.

    On a CPU as many as keep one array of action values near 128 KiB, between 4 and 256; on an accelerator as many as
    fill a tenth of its own memory with a dozen such arrays, at most 4,096.
    """
    row = mdp.n_states * mdp.n_actions * mdp.dtype.itemsize
    if device.platform == "cpu":
        return int(np.clip(2 ** round(np.log2(max(1, 2**17 / row))), 4, 256))
    return int(np.clip(0.1 * _memory(device) / (12 * row), 1, 4096))


def _memory(device: Any) -> int:
    """Bytes of an accelerator."""
    return (device.memory_stats() or {}).get("bytes_limit", 8 * 2**30)


def hash_of(*arrays: Any) -> str:
    """Return what tells arrays from others: a hash of dtypes, shapes and entries."""
    code = hashlib.sha256()
    for x in map(np.asarray, arrays):
        code.update(f"{x.dtype}{x.shape}".encode() + np.ascontiguousarray(x).tobytes())
    return code.hexdigest()


# ---- the problem of some lanes


def problem(
    mdp: MDP, reg: Regulariser, ball: TransitionBall | None, lanes: dict[str, jax.Array]
) -> tuple[MDP, Regulariser, TransitionBall | None]:
    """Put the grid's values, `[width, ...]`, in the place of the leaves of a problem."""
    if "mdp" in lanes:
        mdp = _pick(mdp, lanes["mdp"])
    changed = {n: lanes[n] for n in ("discount", "complement", "reward", "initial") if n in lanes}
    mdp = dataclasses.replace(mdp, **changed, undiscounted=None if "discount" in lanes else mdp.undiscounted)
    leaves: dict[str, Any] = {n: lanes[n] for n in (*reg._scalars, "state_scale") if n in lanes}
    if "prior" in lanes:
        prior = lanes["prior"]
        leaves["log_prior"] = parameters.log_prior(prior[:, None] if prior.ndim == 2 else prior, None)
    regulariser: Any = reg  # of a class that is a dataclass, as all are
    if ball is not None and "ambiguity" in lanes:
        ball = dataclasses.replace(ball, radius=lanes["ambiguity"])
    return mdp, dataclasses.replace(regulariser, **leaves), ball


def per_lane(x: jax.Array, n: int) -> jax.Array:
    """Results that the grid does not change still have a row per lane."""
    return x if x.shape[:1] == (n,) else jnp.broadcast_to(x, (n, *x.shape))


def _pick(mdp: MDP, index: jax.Array) -> MDP:
    """One MDP of a batch per lane."""
    size = mdp.batch_shape[0]
    cores = {"reward": 2, "discount": 0, "complement": 0, "initial": 1, "termination": 2, "available": 2}

    def take(x: Any, core: int) -> Any:
        return x if x is None or x.ndim == core or x.shape[0] != size else x[index]

    picked: dict[str, Any] = {name: take(getattr(mdp, name), core) for name, core in cores.items()}
    kernel: Any = mdp.transitions  # with a batch axis it is one of the classes that hold probabilities
    if kernel.batch_shape:
        kernel = dataclasses.replace(kernel, probabilities=kernel.probabilities[index])
    return dataclasses.replace(mdp, transitions=kernel, **picked)
