"""Sweeps: a grid over the leaves of a problem, solved in chunks of lanes, streamed to disk.

A cell is one combination of grid values and one lane of the kernels. Cells are ordered by how hard they are (discount,
then alpha, then beta), so that lanes solved together take about as many steps as each other and nobody waits long for
the slowest. Together are as many lanes as work fastest (cache-sized on a CPU); a chunk is a row of such batches, each
started from the value of the last cell before it. Neither grows with the sweep, nor does the memory. What the grid does
not vary is shared by the lanes, never copied.

**Files.** With `out`, every finished chunk is a file of its own that appears whole or not at all, beside a manifest
with a digest of everything that the results depend on. A run that is killed loses the chunks in flight; `resume` skips
those that are there. Several processes may share the work (`shard`), each on its own chunks of the same sweep.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robustreg import _host, adversary
from robustreg._progress import reporter
from robustreg.mdp import MDP
from robustreg.regularisers import Regulariser, log_of
from robustreg.solution import Solution, Status
from robustreg.solve import solve
from robustreg.solvers import Solver
from robustreg.store import Fields, Store, open_folder
from robustreg.table import Table

MDP_LEAVES, REGULARISER_LEAVES = ("discount", "reward", "initial"), ("alpha", "beta", "prior", "state_scale")


def _start(m: MDP, value: jax.Array) -> jax.Array:
    return jnp.einsum("...s,...s->...", m.initial, value, precision=jax.lax.Precision.HIGHEST)


def _entropy(m: MDP, reg: Regulariser, sol: Solution) -> jax.Array:
    states = jnp.sum(adversary.occupancy(m, sol.policy), axis=-1)
    logs = jnp.where(sol.policy > 0, jnp.log(jnp.where(sol.policy > 0, sol.policy, 1)), 0)
    entropy = -jnp.sum(sol.policy * logs, axis=-1)
    return jnp.sum(states * entropy, axis=-1) / jnp.sum(states, axis=-1)


def _nominal(m: MDP, reg: Regulariser, sol: Solution) -> jax.Array:
    return _start(m, adversary.evaluate(m, sol.policy))


# What a sweep can put into its table, computed on the device from one chunk: shape [lanes, ...].
OUTPUTS: dict[str, Callable[[MDP, Regulariser, Solution], jax.Array]] = {
    "objective": lambda m, reg, sol: sol.objective,
    "nominal_return": _nominal,
    "regulariser_cost": lambda m, reg, sol: _nominal(m, reg, sol) - sol.objective,
    "price_of_robustness": lambda m, reg, sol: _start(m, adversary.nominal_optimum(m)) - _nominal(m, reg, sol),
    "worst_case_return": lambda m, reg, sol: _start(
        m, adversary.evaluate(m, sol.policy, reward=jnp.broadcast_to(m.reward, sol.q.shape) - sol.perturbation)
    ),
    "policy_entropy": _entropy,
    "gap": lambda m, reg, sol: sol.gap,
    "steps": lambda m, reg, sol: sol.steps,
    "status": lambda m, reg, sol: sol.status,
    "value": lambda m, reg, sol: sol.value,
    "policy": lambda m, reg, sol: sol.policy,
    "perturbation": lambda m, reg, sol: sol.perturbation,
    "occupancy": lambda m, reg, sol: adversary.occupancy(m, sol.policy),
}


def sweep(
    mdp: MDP,
    reg: Regulariser,
    grid: Mapping[str, Any],
    *,
    outputs: Sequence[str] = ("objective", "gap", "steps", "status"),
    zipped: bool = False,
    solver: Solver | None = None,
    tol: float | None = None,
    max_steps: int | None = None,
    chunk: int | None = None,
    out: str | os.PathLike | None = None,
    resume: bool = False,
    shard: tuple[int, int] | None = (0, 1),
    progress: bool | Callable[[dict[str, Any]], None] = False,
) -> Table:
    """Solve a problem at every cell of a grid.

    Args:
        mdp, reg: the problem. One batch axis of the MDP (many MDPs) becomes an axis "mdp" of the grid by itself.
        grid: values by leaf: "beta", "alpha", "discount" `[n]`; "prior" `[n, (S,) A]`, "reward" `[n, S, A]`,
            "initial" `[n, S]`, "state_scale" `[n, S]`. A leaf with axes of its own is numbered in the table.
        outputs: names from `robustreg.sweep.OUTPUTS`.
        zipped: pair the values instead of combining each with each.
        solver, tol, max_steps: as in `solve`.
        chunk: lanes solved together; None chooses by size of the problem and the device. 16 of them are a file.
        out: folder to stream to.
        resume: go on with what `out` already holds.
        shard: (i, n): only the i-th of n parts of the chunks, for jobs side by side; None: no part, only read `out`.
        progress: True shows it on standard error; a function is called with a dict after every chunk.

    Returns:
        A `Table`; the same whether or not it was interrupted. A cell that fails has its `status`, never an exception.

    Raises:
        ValueError: for names and shapes that do not fit, and for a folder that holds another sweep.
        SweepError: where results cannot be written; everything written before is kept.
    """
    plan = _plan(mdp, reg, grid, outputs, zipped, chunk)
    options = (solver, tol, max_steps)
    jobs = [] if shard is None else list(range(shard[0], plan.n_chunks, shard[1]))
    store = open_folder(out, _digest(plan, options), resume) if out is not None else None
    missing = [j for j in jobs if store is None or not store.holds(j)]
    cells = [plan.cells(j).size for j in jobs]
    report = reporter(progress, sum(cells), sum(cells) - sum(plan.cells(j).size for j in missing))
    if store is None:
        table = _Collector(plan)
        _work(plan, options, missing, table.put, report)
        return table.finish()
    _work(plan, options, missing, store.put, report)
    return _read(store, plan)


# ---- the plan: cells, their order, chunks


@dataclasses.dataclass(frozen=True)
class Plan:
    """Cells in the order in which they are solved, and the arrays that they pick from."""

    mdp: MDP
    reg: Regulariser
    values: Mapping[str, np.ndarray]
    coordinates: Mapping[str, np.ndarray]
    outputs: tuple[str, ...]
    zipped: bool
    shape: tuple[int, ...]
    order: np.ndarray
    width: int
    batches: int

    @property
    def chunk(self) -> int:
        """Cells of a chunk."""
        return self.width * self.batches

    @property
    def n_chunks(self) -> int:
        """Chunks in all."""
        return -(-self.order.size // self.chunk)

    def cells(self, job: int) -> np.ndarray:
        """Flat numbers of the cells of a chunk."""
        return self.order[job * self.chunk : (job + 1) * self.chunk]

    def lanes(self, cells: np.ndarray) -> dict[str, np.ndarray]:
        """Grid values of a chunk, `[batches, width, ...]`; a short chunk repeats its last cell."""
        cells = np.concatenate([cells, np.repeat(cells[-1:], self.chunk - cells.size)])
        index = [cells] * len(self.values) if self.zipped else np.unravel_index(cells, self.shape)
        picked = {name: x[i] for (name, x), i in zip(self.values.items(), index)}
        return {name: x.reshape(self.batches, self.width, *x.shape[1:]) for name, x in picked.items()}


def _plan(mdp: MDP, reg: Regulariser, grid: Any, outputs: Sequence[str], zipped: bool, chunk: int | None) -> Plan:
    _host.expect_type(mdp, MDP, "first argument", "mdp")
    _host.expect_type(reg, Regulariser, "second argument", "kl")
    for name in outputs:
        if name not in OUTPUTS:
            raise ValueError(f"unknown output {name!r}; there are: {', '.join(OUTPUTS)}")
    values = {name: _axis(name, x, mdp, reg) for name, x in dict(grid).items()}
    if reg.batch_shape or len(mdp.batch_shape) > 1:
        raise ValueError("the problem of a sweep has no batch axes, but for one of the MDP: put them into the grid")
    if mdp.batch_shape:
        values = {"mdp": np.arange(mdp.batch_shape[0])} | values
    if not values or any(len(x) == 0 for x in values.values()):
        raise ValueError("the grid is empty: give at least one leaf with at least one value")
    lengths = {name: len(x) for name, x in values.items()}
    if zipped and len(set(lengths.values())) > 1:
        raise ValueError(f"zipped axes must be equally long, got {lengths}")
    shape = (next(iter(lengths.values())),) if zipped else tuple(lengths.values())
    coordinates = {n: x if x.ndim == 1 else np.arange(len(x)) for n, x in values.items()}
    size = int(np.prod(shape))
    index = [np.arange(size)] * len(values) if zipped else np.unravel_index(np.arange(size), shape)
    keys = {n: coordinates[n][i] for n, i in zip(values, index)}
    # The last key sorts first: discount before alpha before beta, and one MDP after the other within those.
    hardness = [keys[n] for n in ("mdp", "beta", "alpha", "discount") if n in keys]
    order = np.lexsort(hardness) if hardness else np.arange(size)
    width = min(chunk or _width(mdp), size)
    batches = min(16, -(-size // width))
    return Plan(mdp, reg, values, coordinates, tuple(outputs), zipped, shape, order, width, batches)


def _axis(name: str, x: Any, mdp: MDP, reg: Regulariser) -> np.ndarray:
    """Values of one leaf, checked as the factories check them."""
    allowed = MDP_LEAVES + tuple(n for n in REGULARISER_LEAVES if n == "prior" or hasattr(reg, n))
    if name not in allowed:
        raise ValueError(f"unknown leaf {name!r} in the grid; there are: {', '.join(allowed)}")
    x = _host.number(name, x)
    core = {"reward": 2, "initial": 1, "state_scale": 1}.get(name, 0)
    if name == "prior":
        core = x.ndim - 1
    if x.ndim != core + 1 or (name == "prior" and core not in (1, 2)):
        raise ValueError(f"{name} has shape {x.shape} in the grid; expected one leading axis of values")
    positive = name in ("beta", "state_scale")
    bad = ~np.isfinite(x) | (x <= 0 if positive else x < 0 if name in ("discount", "prior", "initial") else False)
    if name == "discount":
        bad |= x >= 1
    _host.refuse(f"{name}", x, bad, ("i",) * x.ndim, "out of range; see the factory of the leaf")
    return x


def _width(mdp: MDP) -> int:
    """Lanes solved together: on a CPU as many as keep one array of action values near 128 KiB, between 4 and 256; on an
    accelerator as many as fill a tenth of its memory with a dozen such arrays, at most 4,096."""
    row = mdp.n_states * mdp.n_actions * mdp.dtype.itemsize
    device = jax.devices()[0]
    if device.platform == "cpu":
        return int(np.clip(2 ** round(np.log2(max(1, 2**17 / row))), 4, 256))
    limit = (device.memory_stats() or {}).get("bytes_limit", 8 * 2**30)
    return int(np.clip(0.1 * limit / (12 * row), 1, 4096))


# ---- the work


def _work(plan: Plan, options: tuple, jobs: list[int], put: Callable[[int, Fields], None], report: Any) -> None:
    """Solve chunks, as many at a time as a CPU has cores, and hand each to `put`, in a thread of its own."""
    if not jobs:
        return
    # Kernels of one chunk use one core each; an accelerator only needs the next chunk to be ready.
    workers = max(1, min(os.cpu_count() or 1, len(jobs))) if jax.devices()[0].platform == "cpu" else 2
    with ThreadPoolExecutor(workers) as pool, ThreadPoolExecutor(1) as writer:
        queue, running, writing = iter(jobs), set(), set()

        def keep(job: int, fields: Fields) -> None:
            put(job, fields)
            report(plan.cells(job).size, int((fields["status"] != Status.CONVERGED).sum()))

        def refill() -> None:
            for job in queue:
                running.add(pool.submit(_solve_chunk, plan, options, job))
                if len(running) > workers:
                    return

        try:
            refill()
            while running:
                done, running_now = wait(running, return_when=FIRST_COMPLETED)
                running = running_now
                refill()
                for future in done:
                    job, fields = future.result()
                    # A disk slower than the device holds the device up, instead of filling the memory.
                    if len(writing) > 2 * workers:
                        wait(writing, return_when=FIRST_COMPLETED)
                    for write in [w for w in writing if w.done()]:
                        writing.discard(write)
                        write.result()
                    writing.add(writer.submit(keep, job, fields))
            for write in writing:
                write.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _solve_chunk(plan: Plan, options: tuple, job: int) -> tuple[int, Fields]:
    cells = plan.cells(job)
    lanes, dtype = plan.lanes(cells), plan.mdp.dtype
    arrays = {n: jnp.asarray(x, jnp.int32 if n == "mdp" else dtype) for n, x in lanes.items()}
    if "discount" in lanes:
        arrays["complement"] = jnp.asarray(1 - lanes["discount"], dtype)
    solver, tol, max_steps = options
    tol = None if tol is None else jnp.asarray(tol, dtype)
    found = _cells(plan.mdp, plan.reg, arrays, tol, solver, max_steps, tuple(sorted({*plan.outputs, "status"})))
    fields = {name: x.reshape(-1, *x.shape[2:])[: cells.size] for name, x in jax.device_get(found).items()}
    return job, fields


@functools.partial(jax.jit, static_argnames=("solver", "max_steps", "outputs"))
def _cells(
    mdp: MDP, reg: Regulariser, lanes: dict[str, jax.Array], tol: Any, solver: Any, max_steps: Any, outputs: Any
) -> dict[str, jax.Array]:
    """Outputs of one chunk, `[batches, width, ...]` each."""

    def batch(start: jax.Array, lanes: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        m, r = _problem(mdp, reg, lanes)
        sol = solve(m, r, solver, tol=tol, max_steps=max_steps, init=start)
        n = next(iter(lanes.values())).shape[0]
        last = _per_lane(sol.value, n)[-1]
        # A neighbour in beta is nearly the answer; another MDP, or a cell that failed, is none.
        follow = jnp.where(jnp.all(jnp.isfinite(last)), last, 0) if "beta" in lanes and "mdp" not in lanes else start
        return follow, {name: _per_lane(OUTPUTS[name](m, r, sol), n) for name in outputs}

    return jax.lax.scan(batch, jnp.zeros((mdp.n_states,), mdp.dtype), lanes)[1]


def _problem(mdp: MDP, reg: Regulariser, lanes: dict[str, jax.Array]) -> tuple[MDP, Regulariser]:
    """The problem with the grid's values, `[width, ...]`, in the place of its leaves."""
    if "mdp" in lanes:
        mdp = _pick(mdp, lanes["mdp"])
    changed = {n: lanes[n] for n in ("discount", "complement", "reward", "initial") if n in lanes}
    mdp = dataclasses.replace(mdp, **changed)
    leaves: dict[str, Any] = {n: lanes[n] for n in ("alpha", "beta", "state_scale") if n in lanes}
    if "prior" in lanes:
        prior = lanes["prior"]
        leaves["log_prior"] = log_of(prior[:, None] if prior.ndim == 2 else prior)
    regulariser: Any = reg  # of a class that is a dataclass, as all are
    return mdp, dataclasses.replace(regulariser, **leaves)


def _per_lane(x: jax.Array, n: int) -> jax.Array:
    """Results that the grid does not change still have a row per lane."""
    return x if x.shape[:1] == (n,) else jnp.broadcast_to(x, (n, *x.shape))


def _pick(mdp: MDP, index: jax.Array) -> MDP:
    """One MDP of a batch per lane."""
    size = mdp.batch_shape[0]
    cores = {"reward": 2, "discount": 0, "complement": 0, "initial": 1, "termination": 2}

    def take(x: Any, core: int) -> Any:
        return x if x is None or x.ndim == core or x.shape[0] != size else x[index]

    picked: dict[str, Any] = {name: take(getattr(mdp, name), core) for name, core in cores.items()}
    kernel: Any = mdp.transitions  # with a batch axis it is one of the classes that hold probabilities
    if kernel.batch_shape:
        kernel = dataclasses.replace(kernel, probabilities=kernel.probabilities[index])
    return dataclasses.replace(mdp, transitions=kernel, **picked)


# ---- results in memory and on disk


class _Collector:
    """Results of all chunks as arrays over the cells."""

    def __init__(self, plan: Plan):
        self.plan, self.columns = plan, {}
        self.computed = np.zeros(plan.order.size, bool)

    def put(self, job: int, fields: Fields) -> None:
        cells = self.plan.cells(job)
        for name in self.plan.outputs:
            x = fields[name]
            if name not in self.columns:
                empty = np.nan if np.issubdtype(x.dtype, np.floating) else -1
                self.columns[name] = np.full((self.plan.order.size, *x.shape[1:]), empty, x.dtype)
            self.columns[name][cells] = x
        self.computed[cells] = True

    def finish(self) -> Table:
        plan = self.plan
        columns = {n: x.reshape(plan.shape + x.shape[1:]) for n, x in self.columns.items()}
        return Table(dict(plan.coordinates), columns, plan.zipped, self.computed.reshape(plan.shape))


def _digest(plan: Plan, options: tuple) -> dict[str, Any]:
    """Everything that results depend on, as JSON: what two runs must share to share a folder."""
    code = hashlib.sha256()
    leaves, structure = jax.tree.flatten((plan.mdp, plan.reg))
    for x in [*leaves, *plan.values.values(), plan.order]:
        x = np.asarray(x)
        code.update(f"{x.dtype}{x.shape}".encode() + np.ascontiguousarray(x).tobytes())
    solver, tol, max_steps = options
    return {
        "data": code.hexdigest(),
        "structure": hashlib.sha256(str(structure).encode()).hexdigest(),
        "grid": {name: list(x.shape) for name, x in plan.values.items()},
        "zipped": plan.zipped,
        "outputs": list(plan.outputs),
        "solver": repr(solver),
        "tol": None if tol is None else float(tol),
        "max_steps": max_steps,
        "chunk": [plan.width, plan.batches],
        "dtype": str(plan.mdp.dtype),
    }


def _read(store: Store, plan: Plan) -> Table:
    """The table of what a folder holds."""
    table = _Collector(plan)
    for job in range(plan.n_chunks):
        if store.holds(job):
            table.put(job, store.get(job))
    return table.finish()
