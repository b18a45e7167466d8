"""Sweeps: a grid over the leaves of a problem, solved in chunks of lanes, on every device, streamed to disk.

`plan` says what is solved with what: lanes go along beta, and every cell starts from what the last few say
of it. What the grid does not vary is shared by the lanes, never copied, and placed once on each device.

**Devices.** Every device is fed by threads of its own, which take the next chunk from one queue: a device that has hard
chunks takes fewer of them. The alternative, one program over a mesh of devices (`shard_map`), hands out chunks by the
row, so that every row takes as long as its hardest chunk; what it saves is compiling once for each device, which the
threads do at the same time as each other. Every chunk is the same program on the same numbers wherever it runs.

**Files.** With `out`, every finished chunk is a file of its own that appears whole or not at all, beside a manifest
with a digest of everything that the results depend on. A run that is killed loses the chunks in flight; `resume` skips
those that are there. Several processes may share the work (`part`), each on its own chunks of the same sweep.
"""

import contextlib
import dataclasses
import functools
import os
import queue
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from robustreg._core import checks, settings
from robustreg.problems.mdps import MDP
from robustreg.regularisers.regulariser import Regulariser
from robustreg.solvers import ambiguity as balls
from robustreg.solvers.ambiguity import TransitionBall
from robustreg.solvers.loop import check_arguments, solve
from robustreg.solvers.methods import Solver
from robustreg.solvers.plain import regulariser_or_none
from robustreg.solvers.solution import Status
from robustreg.sweeps.digests import digest
from robustreg.sweeps.outputs import OUTPUTS, OUTPUTS_BY_DEFAULT, Cell, best_return
from robustreg.sweeps.plan import Plan, checked_part, layout_of, make_plan, per_lane, problem, relaid
from robustreg.sweeps.progress import reporter
from robustreg.sweeps.store import Fields, Store, open_folder
from robustreg.sweeps.table import Table

# Values that the next one on a line is guessed from: a cubic through four.
_PAST = 4


def sweep(
    mdp: MDP,
    reg: Regulariser | None,
    grid: Mapping[str, Any],
    *,
    outputs: Sequence[str] = OUTPUTS_BY_DEFAULT,
    zipped: bool = False,
    solver: Solver | None = None,
    tol: float | None = None,
    max_steps: int | None = None,
    chunk: int | None = None,
    devices: Sequence[Any] | None = None,
    out: str | os.PathLike | None = None,
    resume: bool = False,
    part: tuple[int, int] | None = (0, 1),
    progress: bool | Callable[[dict[str, Any]], None] = False,
    ambiguity: TransitionBall | None = None,
    shard: Any = (0, 1),
) -> Table:
    """Solve a problem at every cell of a grid.

    Args:
        mdp, reg: the problem. One batch axis of the MDP (many MDPs) becomes an axis "mdp" of the grid by itself.
        grid: values by leaf: "beta", "alpha", "discount" `[n]`; "prior" `[n, (S,) A]`, "reward" `[n, S, A]`,
            "initial" `[n, S]`, "state_scale" `[n, S]`, "ambiguity" `[n]` (radii). A leaf with axes of its own is
            numbered in the table.
        outputs: names from `robustreg.sweeps.OUTPUTS`. With `tol`, the nominal return and what is made of it are
            right to `tol` as well.
        zipped: pair the values instead of combining each with each.
        solver, tol, max_steps, ambiguity: as in `solve`.
        chunk: lanes solved together; None chooses by size of the problem and the device, or as the folder was begun.
            Up to 64 times that is a file. Parts of a sweep that are made on unlike machines need one and the same.
        devices: local devices to share the work; None: all of the kind that holds the problem. Results are the same
            bits on one as on many of the same kind.
        out: folder to stream to.
        resume: go on with what `out` already holds.
        part: (i, n): only the i-th of n parts of the chunks, for jobs side by side; None: no part, only read `out`.
        shard: an older word for `part`.
        progress: True shows it on standard error; a function is called with a dict after every chunk.

    Returns:
        A `Table`; the same whether or not it was interrupted. A cell that fails is no exception, so that the column
        "status" is always there, asked for or not.

    Raises:
        TypeError, ValueError: for names, shapes and values that do not fit, and a folder that holds another sweep.
        SweepError: where results cannot be written; everything written before is kept.
    """
    run = prepare(mdp, reg, grid, outputs, zipped, solver, tol, max_steps, chunk, devices, ambiguity)
    older = not (isinstance(shard, tuple) and shard == (0, 1))
    part = checked_part(shard, "shard") if older else checked_part(part)
    resume = checks.flag("resume", resume)
    progress = progress if callable(progress) else checks.flag("progress", progress)
    if out is None:
        table = _Collector(run.plan)
        run.fill(table, part, progress, lambda: None)
        return table.finish()
    run, store = run.open(out, resume)
    if part is not None:
        with store.held(alone=part == (0, 1)):
            run.fill(store, part, progress, lambda: None)
    return run.read(store)


@dataclasses.dataclass(frozen=True)
class Run:
    """A sweep that is ready to start: its plan, how cells are solved, and where.

    Attributes:
        fixed: whether the caller chose the size of chunks, so that no folder may have another.
    """

    plan: Plan
    solver: Solver | None
    tol: Any
    max_steps: int | None
    devices: tuple[Any, ...]
    fixed: bool

    def digest(self) -> dict[str, Any]:
        """Everything that results depend on but for the layout: what two runs must share to share a folder."""
        return digest(self.plan, (self.solver, self.tol, self.max_steps))

    def open(self, out: str | os.PathLike, resume: bool) -> tuple["Run", Store]:
        """Open its folder, new or resumed (see `store.open_folder`), and take on the layout in which that was begun."""
        mine = layout_of(self.plan)
        store, layout = open_folder(out, self.digest(), mine, resume)
        if layout == mine:
            return self, store
        if self.fixed:
            raise ValueError(
                f"{out} was begun with another chunk ({layout.get('width')} lanes side by side, here "
                f"{mine['width']}); leave chunk out to go on with it"
            )
        try:
            return dataclasses.replace(self, plan=relaid(self.plan, layout)), store
        except ValueError as error:
            raise ValueError(f"{out} cannot be read: {error}; take another folder") from error

    def fill(
        self, kept: "Store | _Collector", part: tuple[int, int] | None, progress: Any, check: Callable[[], None]
    ) -> None:
        """Compute what is not kept yet of one part of the chunks; `check` is called now and then, and may raise."""
        # The hard chunks, which are the last, come first: at the end nobody waits long for another's.
        jobs = [] if part is None else list(range(part[0], self.plan.n_chunks, part[1]))[::-1]
        missing = [job for job in jobs if self._kept(kept, job) is None]
        cells, left = (sum(self.plan.cells(job).size for job in some) for some in (jobs, missing))
        if missing:
            _work(self, missing, kept.put, reporter(progress, cells, cells - left), check)

    def read(self, store: Store) -> Table:
        """Read the table of what a folder holds."""
        table = _Collector(self.plan)
        for job in range(self.plan.n_chunks):
            if (fields := self._kept(store, job)) is not None:
                table.put(job, fields)
        return table.finish()

    def _kept(self, kept: "Store | _Collector", job: int) -> Fields | None:
        """A chunk that was computed before."""
        return kept.get(job, _named(self.plan), self.plan.cells(job).size)


def prepare(
    mdp: MDP,
    reg: Regulariser | None,
    grid: Mapping[str, Any],
    outputs: Sequence[str] = OUTPUTS_BY_DEFAULT,
    zipped: bool = False,
    solver: Solver | None = None,
    tol: float | None = None,
    max_steps: int | None = None,
    chunk: int | None = None,
    devices: Sequence[Any] | None = None,
    ambiguity: TransitionBall | None = None,
) -> Run:
    """Check the arguments of `sweep` that say what is solved, and where."""
    if not isinstance(grid, Mapping):
        raise TypeError(
            f"grid must map names of leaves to values, as {{'beta': [1.0, 2.0]}}, got {type(grid).__name__}"
        )
    if checks.is_traced(mdp, reg, tol, ambiguity, *grid.values()):
        raise TypeError("sweep needs values, so it cannot run inside jit, vmap or grad: call solve there")
    own: Any = regulariser_or_none(mdp, reg)
    check_arguments(mdp, own, solver, tol)
    mdp, own = mdp._canonical(), checks.canonical(own)
    max_steps = None if max_steps is None else checks.count("max_steps", max_steps)
    chunk = None if chunk is None else checks.count("chunk", chunk)
    if tol is not None and checks.number("tol", tol).ndim > 0:
        raise ValueError(f"tol must be one number for all cells, got shape {np.shape(tol)}")
    if isinstance(outputs, str):
        raise TypeError(f"outputs must be a sequence of names: write outputs=[{outputs!r}]")
    if not isinstance(outputs, Iterable) or not all(isinstance(name, str) for name in outputs):
        raise TypeError(f"outputs must be a sequence of names, got {type(outputs).__name__}")
    zipped = checks.flag("zipped", zipped)
    for name in outputs:
        if name not in OUTPUTS:
            raise ValueError(f"unknown output {name!r}; there are: {', '.join(OUTPUTS)}")
    where = _devices(mdp, devices)
    ball = None if ambiguity is None else balls.checked(ambiguity, mdp)
    plan = make_plan(mdp, own, grid, outputs, zipped, chunk, where, ball)
    # An array of the working precision: a Python float would be traced as weakly typed, and compile anew.
    asked = None if tol is None else np.asarray(tol, mdp.dtype)
    # Leaves that do not fit each other are found before a folder is made; the program that is traced is used later.
    _cells.eval_shape(
        mdp._with_sparsity(), plan.reg, ball, asked, plan.lanes(0), plan.begins, solver, max_steps, _named(plan)
    )
    return Run(plan, solver, asked, max_steps, where, chunk is not None)


def _named(plan: Plan) -> tuple[str, ...]:
    """The outputs of every cell in a fixed order, its status among them."""
    return tuple(sorted({*plan.outputs, "status"}))


def _devices(mdp: MDP, devices: Sequence[Any] | None) -> tuple[Any, ...]:
    """The devices asked for; None: all of this process of the kind that holds the problem."""
    if devices is None:
        return tuple(jax.local_devices(backend=next(iter(mdp.reward.devices())).platform))
    devices = list(devices) if isinstance(devices, Iterable) else []
    if not devices or not all(isinstance(device, jax.Device) for device in devices):
        raise TypeError("devices must be a sequence of jax devices such as jax.local_devices()")
    if foreign := [device for device in devices if device.process_index != jax.process_index()]:
        raise ValueError(f"{foreign[0]} belongs to another process: each process sweeps its own part, see part")
    return tuple(dict.fromkeys(devices))


# ---- the work


def _fed(devices: Sequence[Any], jobs: int) -> list[Any]:
    """The device of every thread."""
    # Kernels of one chunk use one core each; an accelerator only needs the next chunk to be ready.
    cores = max(1, checks.cores() // len(devices))
    rounds = max(cores if device.platform == "cpu" else 2 for device in devices)
    return [device for _ in range(rounds) for device in devices][:jobs]


def _work(run: Run, jobs: list[int], put: Callable[[int, Fields], None], report: Any, check: Any) -> None:
    """Solve chunks, as many at a time as devices and cores take, and hand each to `put`, in the calling thread."""
    threads_of = _fed(run.devices, len(jobs))
    problem = run.plan.mdp._with_sparsity(), run.plan.reg, run.plan.ball, run.tol
    placed = {device: jax.device_put(problem, device) for device in set(threads_of)}
    todo, stop = queue.SimpleQueue(), threading.Event()
    for job in jobs:
        todo.put(job)
    # A disk slower than the devices holds them up, instead of filling the memory.
    done: queue.Queue[tuple[int, Any]] = queue.Queue(2 * len(threads_of))

    def serve(device: Any) -> None:
        try:
            while not stop.is_set():
                job = todo.get_nowait()
                done.put((job, _solve_chunk(run, placed[device], device, job)))
        except queue.Empty:
            return
        except BaseException as error:
            done.put((-1, error))

    threads = [threading.Thread(target=settings.carried(serve), args=(device,)) for device in threads_of]
    try:
        for thread in threads:
            thread.start()
        left = len(jobs)
        while left:
            check()
            try:
                job, fields = done.get(timeout=1.0)
            except queue.Empty:
                continue
            if isinstance(fields, BaseException):
                raise fields
            put(job, fields)
            report(run.plan.cells(job).size, int((fields["status"] != Status.CONVERGED).sum()))
            left -= 1
    finally:
        stop.set()
        for thread in threads:
            while thread.is_alive():
                with contextlib.suppress(queue.Empty):  # it may wait for room
                    done.get_nowait()
                thread.join(0.02)


def _solve_chunk(run: Run, placed: Any, device: Any, job: int) -> Fields:
    lanes, begins = jax.device_put((run.plan.lanes(job), run.plan.begins), device)
    found = _cells(*placed, lanes, begins, run.solver, run.max_steps, _named(run.plan))
    there = run.plan.layout(job) >= 0
    return {name: x[there] for name, x in jax.device_get(found).items()}


@functools.partial(jax.jit, static_argnames=("solver", "max_steps", "outputs"))
def _cells(
    mdp: MDP,
    reg: Regulariser,
    ball: TransitionBall | None,
    tol: Any,
    lanes: dict[str, jax.Array],
    begins: jax.Array,
    solver: Any,
    max_steps: Any,
    outputs: Any,
) -> dict[str, jax.Array]:
    """Outputs of one chunk, `[length, width, ...]` each; `lanes` and `begins` as `Plan` makes them."""
    n = next(iter(lanes.values())).shape[1]
    past = jnp.full((_PAST, n, mdp.n_states), jnp.nan, mdp.dtype)
    priced, visited = "price_of_robustness" in outputs, any(OUTPUTS[name].visited for name in outputs)
    followed = any(OUTPUTS[name].nominal for name in outputs) and not visited

    def place(past: tuple[jax.Array, ...], here: Any) -> tuple[Any, dict[str, jax.Array]]:
        """Solve the cells at one place of every path, started from those at the places before."""
        lanes, begins = here
        m, r, b = problem(mdp, reg, ball, lanes)
        x = jnp.log(lanes.get("beta", jnp.ones(n, mdp.dtype)))
        values, nominals, xs, optimum = *(jnp.where(begins, jnp.nan, v) for v in past[:2]), *past[2:]
        if priced:  # the same all along a line
            optimum = jax.lax.cond(begins, lambda: per_lane(best_return(m, r), n), lambda: optimum)
        sol = solve(m, r, solver, tol=tol, max_steps=max_steps, init=_continued(values, xs, x), ambiguity=b)
        cell = Cell(m, sol, optimum if priced else None, visited, _continued(nominals, xs, x), tol)
        values = jnp.concatenate([per_lane(sol.value, n)[None], values[:-1]])
        if followed:
            nominals = jnp.concatenate([per_lane(cell.nominal, n)[None], nominals[:-1]])
        xs = jnp.concatenate([x[None], xs[:-1]])
        return (values, nominals, xs, optimum), {name: per_lane(OUTPUTS[name].compute(cell), n) for name in outputs}

    return jax.lax.scan(place, (past, past, past[..., 0], past[0, :, 0]), (lanes, begins))[1]


def _continued(values: jax.Array, xs: jax.Array, x: jax.Array) -> jax.Array:
    """Tell what the last values of a line say of the next one, `[width, S]`: the polynomial through the last k, or 0.

    Which k is told by how little its guess differs from that with one value less (the guess from a single value, from
    the value before it): more follow a smooth line further, but blow errors up more, and mislead where the line bends.

    Args:
        values: `[_PAST, width, S]`, the newest first; NaN where there is none.
        xs, x: where they belong and where the next one does, `[_PAST, width]` and `[width]`.
    """

    def through(k: int) -> jax.Array:
        weights = (
            functools.reduce(
                jnp.multiply, ((x - xs[j]) / (xs[i] - xs[j]) for j in range(k) if j != i), jnp.ones_like(x)
            )
            for i in range(k)
        )
        return functools.reduce(jnp.add, (w[:, None] * v for w, v in zip(weights, values)))

    guesses = jnp.stack([through(k) for k in range(1, _PAST + 1)])
    changes = jnp.max(jnp.abs(guesses - jnp.concatenate([values[1:2], guesses[:-1]])), axis=-1)
    # With the factor, a line is followed no further than twice as far as its values lie apart: two that are neighbours
    # but for rounding have no direction.
    changes = jnp.where(jnp.isfinite(changes), changes, jnp.inf).at[0].multiply(2)
    best = jnp.argmin(changes, axis=0)
    guess = jnp.take_along_axis(guesses, best[None, :, None], axis=0)[0]
    change = jnp.take_along_axis(changes, best[None], axis=0)[0]
    # A guess that may err by half of what states differ by is worse than none. (Of a single value nothing is known.)
    lost = jnp.isfinite(change) & (change > 0.5 * jnp.ptp(values[0], axis=-1))
    return jnp.where(jnp.isfinite(guess) & ~lost[:, None], guess, 0)


# ---- results in memory and on disk


class _Collector:
    """Results of all chunks as arrays over the cells."""

    def __init__(self, plan: Plan):
        self.plan, self.columns = plan, {}
        self.computed = np.zeros(plan.size, bool)

    def get(self, job: int, names: Collection[str], cells: int) -> Fields | None:
        """Nothing is there before it is computed."""
        return None

    def put(self, job: int, fields: Fields) -> None:
        cells = self.plan.cells(job)
        for name in dict.fromkeys((*self.plan.outputs, "status")):
            x = fields[name]
            if name not in self.columns:
                empty = np.nan if np.issubdtype(x.dtype, np.floating) else -1
                self.columns[name] = np.full((self.plan.size, *x.shape[1:]), empty, x.dtype)
            self.columns[name][cells] = x
        self.computed[cells] = True

    def finish(self) -> Table:
        plan = self.plan
        columns = {n: x.reshape(plan.shape + x.shape[1:]) for n, x in self.columns.items()}
        return Table(dict(plan.coordinates), columns, plan.zipped, self.computed.reshape(plan.shape))
