"""How fast are sweeps on an accelerator, beside what one would write by hand, and are the certificates true?

    python benchmarks/gpu.py [--sections grids,kernel,turns,single,mixed,dense,orders,double,sweep,rest,tf32,states]
                             [--size small|full] [--budget 460] [--json FILE]

* `grids`: slippery grids, betas log-spaced in [.1, 300]; `dense`: Garnets of 64 states, 256 and 4,096 of them, dense
  and as successor lists; `mixed`: discounts .9, .99 and .999 in one call against the three apart; `orders`: alpha .5,
  1.5, 2. Methods: *vmapped hand*, `jit(vmap(while_loop))` of soft value iteration with a sup-norm stop; *careful hand*,
  relative value iteration with the lanes last, stopped by the span, whose answer is the midpoint; *loop*, `rr.solve`
  with `ROBUSTREG_KERNEL=0`; *solve*, with `ROBUSTREG_KERNEL=1`. All are jitted functions of beta that return the
  values, as the hand-written ones do; *everything* is `rr.solve` with all that it returns.
* `kernel`: the kernel alone, and its arithmetic. `turns`: the loop alone with other numbers of plain sweeps before
  Newton's method (by the root of the number of states) and of Krylov steps between two looks. `sweep`: `rr.sweep` to
  a million cells. `single`: one problem, value and value with gradient, warm and first call. `states`: one MDP of up
  to ten million states. `rest`: gradients of many lanes, a game, calibration, one-step layers. `double`: float64.
  `tf32`: certificates where products of matrices are forced into TF32.

Times are medians of warm calls to the end of their work. Values of every thousandth lane (five at least) are solved
again in float64 by NumPy, and must lie within the certified interval: `inside`. `rate` is how fast memory is copied and
products of matrices are formed on this device in the same run; `flop_per_s` of a solve counts the additions and
products of its backups and Krylov steps. Every section runs by itself: one that fails is reported, the others go on. At
the end stands what is asked of a card (`asked.py`), and whether these rows have it.

No printout of a GPU yet. *Careful hand* and *loop* on two shared CPU cores (JAX 0.12.0, float32, 2026-11-30), `inside`
in every row but careful hand's of the 16 x 16 grid at .999, which float32 stops outside its tolerance:

                                           careful hand              loop            times   first call, s
    grid 16 0.9          256 betas            34 ms             24 ms              1.4        .41, 4.7
    grid 16 0.99         256                 679                47                14.5        .80, 4.3
    grid 16 0.999        256               1,161               161                 7.2       1.6,  4.9
    grid 32 0.9          256                 258                90                 2.9        .62, 5.3
    grid 32 0.99         256               2,014               337                 6.0       2.3,  5.9
    grid 32 0.999        256              17,244               444                38.8      16,    6.3
    256 dense 64       4,096                 262               475                  .55       .71, 5.3
    4096 dense 64      4,096               1,331               893                 1.5       1.6,  6.3
    256 sparse 64      4,096                 449               212                 2.1       1.0,  5.8
    4096 sparse 64     4,096               1,040               220                 4.7       1.5,  5.0
"""

import argparse
import datetime
import functools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import robustreg as rr  # noqa: E402  # the checkout's own
from benchmarks.asked import verdicts  # noqa: E402
from benchmarks.hand import Problem, careful_hand, inside, vmapped_hand  # noqa: E402
from robustreg.solvers import bound_problem, krylov, resident, resident_kernel
from robustreg.solvers.tolerance import Tolerance  # noqa: E402

Row = dict[str, Any]
SMALL = False
METHODS = "vmapped,careful,loop,solve,everything"


def answers(
    problem: Problem, everything: bool = False, order: float | None = None, solver: rr.Newton | None = None
) -> Callable[..., Any]:
    """`rr.solve` as a function of beta: the values with their status and bounds, or all it returns."""
    m = problem.mdp
    if m.batch_shape:
        m = jax.tree.map(lambda x: x[:, None] if x.ndim and x.shape[0] == m.batch_shape[0] else x, m)

    def run(m: Any, beta: jax.Array) -> Any:
        reg = rr.kl(beta) if order is None else rr.alpha(jnp.float32(order), beta)
        sol = rr.solve(m, reg, solver, tol=problem.tol)
        return sol if everything else (sol.value, sol.status, sol.gap)

    return functools.partial(jax.jit(run), m._with_sparsity())


def timed(function: Callable[[], Any], most: int = 7, seconds: float = 1.0) -> tuple[float, float]:
    """Median seconds of warm calls, and of the first."""
    begin = time.perf_counter()
    jax.block_until_ready(function())
    first, times = time.perf_counter() - begin, []
    while len(times) < most and (not times or sum(times) < seconds):
        begin = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - begin)
    return float(np.median(times)), first


def measured(run: Callable[..., Any], betas: jax.Array, kernel: bool = True) -> tuple[Any, Row]:
    """What a function of beta returns, and how long it takes; without the kernel, every solve is left to the loop."""
    jax.clear_caches()  # the setting is read when a solve is traced
    os.environ["ROBUSTREG_KERNEL"] = str(int(kernel))
    try:
        seconds, first = timed(lambda: run(betas))
        return run(betas), {"seconds": seconds, "per_second": betas.size / seconds, "first_s": first}
    finally:
        os.environ.pop("ROBUSTREG_KERNEL", None)
        if not kernel:
            jax.clear_caches()


def compare(section: str, problem: Problem, n: int, methods: str = METHODS) -> list[Row]:
    """Rows of one problem with n lanes."""
    betas, rows = problem.lanes(n), []
    makers: dict[str, Callable[[], Callable[..., Any]]] = {
        "vmapped": lambda: vmapped_hand(problem),
        "careful": lambda: careful_hand(problem),
        "loop": lambda: answers(problem),
        "solve": lambda: answers(problem),
        "everything": lambda: answers(problem, everything=True),
    }
    for method in methods.split(","):
        row: Row = {"section": section, "problem": problem.name, "lanes": n, "method": method}
        try:
            found, times = measured(makers[method](), betas, method != "loop")
            row |= times
            if method in ("vmapped", "careful"):
                row["inside"] = inside(problem, betas, found, problem.tol)
            elif method in ("loop", "solve"):
                value, status, gap = found
                row |= {"inside": inside(problem, betas, value, gap / 2), "failed": int((status != 0).sum())}
        except Exception as error:  # out of memory at the largest sizes, say
            row |= said(error)
        rows.append(show(row))
    return rows


def said(error: Exception) -> Row:
    """An exception as a row."""
    return {"error": f"{type(error).__name__}: {str(error)[:300]}"}


def show(row: Row) -> Row:
    """Print a row as it comes."""
    head = f"{row['section']:<8}{row.get('problem', ''):<22}{row.get('lanes', ''):>9}  {row.get('method', ''):<22}"
    if "error" in row:
        print(f"{head} !! {row['error']}", flush=True)
        return row
    rest = {k: v for k, v in row.items() if k not in ("section", "problem", "lanes", "method", "seconds", "per_second")}
    rate = f"{row['per_second']:>14,.0f}/s" if "per_second" in row else ""
    text = " ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in rest.items())
    spent = f"{1e3 * row['seconds']:>11.3f} ms" if "seconds" in row else ""
    print(f"{head}{spent}{rate}  {text}", flush=True)
    return row


def grid(size: int, discount: float, tol: float) -> Problem:
    """A slippery grid."""
    mdp = rr.problems.slippery_grid(size, discount, dtype=np.float32)
    return Problem(f"grid {size} {discount:g}", mdp, tol)


def grids() -> list[Row]:
    """Grids at three discounts, and up to a million lanes."""
    if SMALL:
        return compare("grids", grid(4, 0.9, 1e-3), 16)
    rows = []
    for size in (16, 32):
        for discount, tol in ((0.99, 1e-3), (0.9, 1e-4), (0.999, 3e-2)):
            for n in (256, 4096):
                rows += compare("grids", grid(size, discount, tol), n)
    rows += compare("grids", grid(16, 0.99, 1e-3), 65_536)
    rows += compare("grids", grid(32, 0.99, 1e-3), 65_536, "careful,solve,everything")
    return rows + compare("grids", grid(16, 0.99, 1e-3), 1_000_000, "careful,solve")


def kernel() -> list[Row]:
    """The kernel alone: products and backups of a lane, and the arithmetic that they are.

    Also with other constants than those that `solvers.resident` was given after such a run: states of a thread, plain
    sweeps by the root of the number of states, and registers of a thread.
    """
    chosen, rows = (resident_kernel.OWN, resident.SWEEPS, resident_kernel.EACH), []
    others = [] if SMALL else [(2, 2, 128), (8, 2, 128), (4, 1, 128), (4, 4, 128), (4, 2, 96), (4, 2, 168)]
    for constants in (chosen, *others):
        try:
            resident_kernel.OWN, resident.SWEEPS, resident_kernel.EACH = constants
            for size in (4,) if SMALL else (16, 32):
                rows.append(alone(grid(size, 0.9 if SMALL else 0.99, 1e-3), constants))
        finally:
            resident_kernel.OWN, resident.SWEEPS, resident_kernel.EACH = chosen
    return rows


def alone(problem: Problem, constants: tuple[int, int, int]) -> Row:
    """The kernel of one grid."""
    m, betas = problem.mdp._with_sparsity(), problem.lanes(8 if SMALL else 4096)

    def run(m: Any, beta: jax.Array) -> Any:
        lanes = bound_problem.bind(m, rr.kl(beta))
        found = resident.find(lanes, rr.Newton())
        start = jnp.zeros((m.n_states, *beta.shape), jnp.float32)
        tol = Tolerance.read(problem.tol, jnp.float32).broadcast(beta.shape)
        return None if found is None else found[1](lanes, tol, jnp.asarray(2**30, jnp.int32), start)

    resident_kernel.function.cache_clear()
    resident_kernel.works.cache_clear()
    row: Row = {"section": "kernel", "problem": problem.name, "lanes": betas.size, "method": f"{constants}"}
    try:
        found, times = measured(functools.partial(jax.jit(run), m), betas)
    except Exception as error:  # too many registers, say
        return show(row | said(error))
    if found is None:
        return show(row | {"error": "no kernel on this device"})
    n_entries = resident.entries(bound_problem.bind(m, rr.kl(betas)))
    steps, products = (np.asarray(x, float) for x in (found.steps, found.products))
    work = m.n_states * (steps * m.n_actions * (2 * n_entries + 8) + products * (2 * n_entries + 15)).sum()
    row |= {"products": products.mean(), "most": products.max(), "backups": steps.mean()}
    row["inside"] = inside(problem, betas, (found.h + found.c[None]).T, found.half_width)
    return show(row | times | {"flop_per_s": work / times["seconds"]})


def turns() -> list[Row]:
    """The loop without the kernel, with other numbers than `solvers.methods` and `solvers.krylov` were given."""
    usual, rows = krylov.steps_per_turn, []
    pairs = [(0, 1), (4, 4)] if SMALL else [(0, 1), (0, 4), (2, 4), (4, 1), (4, 4), (4, 8), (8, 4)]
    for problem in [grid(4, 0.9, 1e-3)] if SMALL else [grid(size, 0.99, 1e-3) for size in (16, 32)]:
        betas = problem.lanes(8 if SMALL else 4096)
        for root, steps in pairs:
            row: Row = {"section": "turns", "problem": problem.name, "lanes": betas.size}
            row |= {"method": f"{root} sqrt(S) sweeps, {steps}"}
            solver = rr.Newton(sweeps=round(root * problem.mdp.n_states**0.5))
            krylov.steps_per_turn = lambda steps=steps: steps
            try:
                (value, status, gap), times = measured(answers(problem, solver=solver), betas, kernel=False)
                row |= times | {"inside": inside(problem, betas, value, gap / 2), "failed": int((status != 0).sum())}
            except Exception as error:
                row |= said(error)
            finally:
                krylov.steps_per_turn = usual
            rows.append(show(row))
    return rows


def sparse(count: int) -> Any:
    """Garnets that share one graph, as successor lists with rows and rewards of their own."""
    one: Any = rr.problems.garnet(64, 4, 4, 0.99, dtype=np.float32)
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(4), (count, 64, 4)).astype(np.float32)
    rows = rr.Successors(one.transitions.indices, jnp.asarray(p))
    return rr.mdp(rows, rng.random((count, 64, 4), dtype=np.float32), 0.99)


def dense() -> list[Row]:
    """Distinct small MDPs."""
    rows = []
    for count, n in ((2, 8),) if SMALL else ((256, 4096), (256, 65_536), (4096, 4096), (4096, 65_536)):
        mdp = rr.problems.garnets(count, 16 if SMALL else 64, 4, 5, 0.99, dtype=np.float32)
        methods = "vmapped,careful,loop,solve,everything" if n < 65_536 else "careful,solve"
        rows += compare("dense", Problem(f"{count} dense 64", mdp, 1e-3, (1.0, 100.0)), n, methods)
        rows += compare("dense", Problem(f"{count} sparse 64", sparse(count), 1e-3, (1.0, 100.0)), n, methods)
    return rows


def mixed() -> list[Row]:
    """Discounts of unlike hardness in one call, against the sum of the parts."""
    size, n = (4, 6) if SMALL else (32, 3072)
    discounts = (0.9, 0.99, 0.999)
    reg = rr.kl(jnp.asarray(np.geomspace(0.1, 300, n // 3, dtype=np.float32)))
    rows, apart = [], 0.0
    run = jax.jit(lambda m: rr.solve(m, reg, tol=3e-2).value)
    for g in (*discounts, None):
        m = rr.problems.slippery_grid(size, np.asarray(discounts)[:, None] if g is None else g, dtype=np.float32)
        m = m._with_sparsity()
        seconds, _ = timed(lambda m=m: run(m))
        row: Row = {"section": "mixed", "problem": f"grid {size} {g or 'together'}", "seconds": seconds}
        row |= {"lanes": n} | {"of_the_sum": seconds / apart} if g is None else {"lanes": n // 3}
        apart += seconds
        rows.append(show(row))
    return rows


def orders() -> list[Row]:
    """Alpha-divergences, with and without the kernel."""
    problem, n = (grid(4, 0.9, 1e-3), 8) if SMALL else (grid(16, 0.99, 1e-3), 4096)
    rows = []
    for order in (0.5, 1.5, 2.0):
        for method in ("loop", "solve"):
            (_, status, _), row = measured(answers(problem, order=order), problem.lanes(n), method != "loop")
            about = {"section": "orders", "problem": f"{problem.name}, alpha {order}", "lanes": n, "method": method}
            rows.append(show(about | row | {"failed": int((status != 0).sum())}))
    return rows


def double() -> list[Row]:
    """Lanes in float64, which the kernel leaves to the loop."""
    size, n = (4, 8) if SMALL else (16, 4096)
    with jax.enable_x64(True):
        problem = Problem(f"grid {size} 0.99", rr.problems.slippery_grid(size, 0.99, dtype=np.float64), 1e-6)
        return compare("double", problem, n, "vmapped,careful,loop")


def sweep() -> list[Row]:
    """Tables of many cells."""
    problem, rows = (grid(4, 0.9, 1e-3) if SMALL else grid(16, 0.99, 1e-3)), []
    for n in (32,) if SMALL else (10_000, 100_000, 1_000_000):
        values = np.geomspace(*problem.betas, n)

        def run(values: np.ndarray = values) -> Any:
            outputs = ("objective", "gap", "status")
            return rr.sweep(problem.mdp, rr.kl(1.0), {"beta": values}, tol=problem.tol, outputs=outputs)["objective"]

        seconds, first = timed(run, 3)
        row = {"section": "sweep", "problem": problem.name, "lanes": n, "method": "sweep", "seconds": seconds}
        rows.append(show(row | {"per_second": n / seconds, "first_s": first}))
    return rows


def single() -> list[Row]:
    """One problem: value, and value with the gradient in the rewards."""
    made = {"grid 4": lambda: rr.problems.slippery_grid(4, 0.9, dtype=np.float32)}
    if not SMALL:
        made = {f"grid {n}": lambda n=n: rr.problems.slippery_grid(n, 0.99, dtype=np.float32) for n in (16, 32)}
        made |= {"Garnet 500x8x8": lambda: rr.problems.garnet(dtype=np.float32)}
    rows = []
    for name, make in made.items():
        m = make()._with_sparsity()

        def objective(reward: jax.Array, m: Any = m) -> jax.Array:
            return rr.solve(rr.mdp(m.transitions, reward, m.discount), rr.kl(jnp.float32(3.0)), tol=1e-3).objective

        for method, run in (("value", jax.jit(objective)), ("value, gradient", jax.jit(jax.value_and_grad(objective)))):
            seconds, first = timed(lambda run=run, m=m: run(m.reward), 30)
            row = {"section": "single", "problem": name, "lanes": 1, "method": method, "seconds": seconds}
            rows.append(show(row | {"first_s": first}))
    return rows


def states() -> list[Row]:
    """One large MDP."""
    rows = []
    for n in (64,) if SMALL else (1_000_000, 10_000_000):
        rng, s = np.random.default_rng(0), np.arange(n)
        indices = np.stack([(s[:, None] + k) % n for k in (rng.integers(1, n, 4), [0] * 4)], axis=-1).astype(np.int32)
        p = np.broadcast_to(np.array([0.75, 0.25], np.float32), indices.shape)
        m = rr.mdp(rr.Successors(jnp.asarray(indices), jnp.asarray(p)), rng.random((n, 4), dtype=np.float32), 0.95)
        seconds, first = timed(lambda m=m: rr.solve(m, rr.kl(jnp.float32(3.0)), tol=1e-3).value, 3)
        row = {"section": "states", "problem": f"{n:,} states", "lanes": 1, "method": "solve", "seconds": seconds}
        rows.append(show(row | {"first_s": first}))
    return rows


def rest() -> list[Row]:
    """Gradients of many lanes, a game, calibration, and the one-step layer."""
    size, n = (4, 4) if SMALL else (16, 1024)
    m = rr.problems.slippery_grid(size, 0.9, dtype=np.float32)._with_sparsity()
    betas = jnp.asarray(np.geomspace(0.1, 300, n, dtype=np.float32))
    logits = jax.random.normal(jax.random.key(0), (8, 32) if SMALL else (1024, 32_000), jnp.float32)
    total = jax.jit(jax.grad(lambda b: rr.solve(m, rr.kl(b), tol=1e-3).objective.sum()))
    errors = -jnp.abs(jax.random.normal(jax.random.key(1), (9 if SMALL else 99, m.n_states, m.n_actions), jnp.float32))
    errors = errors.at[..., 0].multiply(-1)  # what is feared raises one reward and lowers the others
    chosen = jax.jit(lambda x: rr.calibrate(rr.kl(jnp.float32(1.0)), x, 0.9))
    calls: dict[str, Callable[[], Any]] = {
        f"calibration, {len(errors)} samples": lambda: chosen(errors),
        f"gradient, {n} lanes": lambda: total(betas),
        f"game, {n} lanes": lambda: rr.solve_game(m, rr.kl(betas), tol=1e-3),
        "layer, softmax": functools.partial(jax.jit(jax.grad(lambda x: (jax.nn.softmax(x) ** 2).sum())), logits),
    }
    layers = {"KL": rr.kl(jnp.float32(1.0)), "alpha 1.5": rr.alpha(jnp.float32(1.5), jnp.float32(1.0))}
    for name, reg in layers.items():
        layer = jax.jit(jax.grad(lambda x, reg=reg: (reg.argmax(x) ** 2).sum()))
        calls[f"layer, {name}"] = functools.partial(layer, logits)
    rows = []
    for name, call in calls.items():
        row: Row = {"section": "rest", "method": name}
        try:
            row["seconds"], row["first_s"] = timed(call)
        except Exception as error:  # the others are still worth having
            row |= said(error)
        rows.append(show(row))
    return rows


def tf32() -> list[Row]:
    """Certificates where products of matrices are forced into TF32: the same statuses, and true."""
    count = 2 if SMALL else 64
    mdp = rr.problems.garnets(count, 16 if SMALL else 96, 4, 5, 0.99, dtype=np.float32)
    problem, rows = Problem(f"{count} dense", mdp, 1e-3, (1.0, 100.0)), []
    betas = problem.lanes(4 * count)
    (_, plain, _), _ = measured(answers(problem), betas)
    with jax.default_matmul_precision("tensorfloat32"):
        for method in ("loop", "solve"):
            (value, status, gap), row = measured(answers(problem), betas, method != "loop")
            row |= {"section": "tf32", "problem": problem.name, "lanes": betas.size, "method": method}
            row |= {"inside": inside(problem, betas, value, gap / 2), "same": bool((status == plain).all())}
            rows.append(show(row))
    return rows


def rates() -> list[Row]:
    """Speed of memory and of arithmetic on this device."""
    x = jnp.ones(1 << (16 if SMALL else 29), jnp.float32)
    y = jnp.ones((64, 64) if SMALL else (8192, 8192), jnp.float32)
    copy, multiply = jax.jit(lambda x: x + 1), jax.jit(lambda y: jnp.matmul(y, y, precision="highest"))
    first, second = timed(lambda: copy(x))[0], timed(lambda: multiply(y))[0]
    rows: list[Row] = [{"section": "rate", "method": "copy", "seconds": first, "bytes_per_s": 2 * x.nbytes / first}]
    flop = 2 * y.shape[0] ** 3
    rows += [{"section": "rate", "method": "float32 product", "seconds": second, "flop_per_s": flop / second}]
    return [show(row) for row in rows]


SECTIONS = {
    f.__name__: f for f in (grids, kernel, turns, single, mixed, dense, orders, double, sweep, rest, tf32, states)
}


def main() -> None:
    """Run the sections, print rows as they come, and write JSON lines if asked to."""
    global SMALL
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--size", choices=("small", "full"), default="full")
    parser.add_argument("--budget", type=float, default=460, help="seconds after which no further section is begun")
    parser.add_argument("--json", help="append JSON lines to this file")
    options = parser.parse_args()
    SMALL, begin, device = options.size == "small", time.time(), jax.devices()[0]
    about = {"date": datetime.date.today().isoformat(), "device": device.device_kind, "jax": jax.__version__}
    about |= {"robustreg": rr.__version__, "python": sys.version.split()[0], "size": options.size}
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    everything: list[Row] = []

    def asked() -> list[Row]:
        return [show(row) for row in verdicts(everything)]

    for section in [rates, *(SECTIONS[name] for name in options.sections.split(",")), asked]:
        if section is not asked and time.time() - begin > options.budget:
            print(f"{section.__name__}: no time left", flush=True)
            continue
        try:
            rows = section()
        except Exception as error:  # the others are still worth having
            rows = [show({"section": section.__name__} | said(error))]
            traceback.print_exc()
        everything += rows
        if options.json:
            with open(options.json, "a") as file:
                file.writelines(json.dumps(about | row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
