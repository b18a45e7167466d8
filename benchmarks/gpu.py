"""How fast are sweeps on an accelerator, beside what one would write by hand, and are the certificates true?

    python benchmarks/gpu.py [--sections grids,dense,mixed,orders,sweep,single,states,rest] [--size small|full]
                             [--budget 460] [--json FILE]

* `grids`: slippery grids, betas log-spaced in [.1, 300]; `dense`: Garnets of 64 states, 256 and 4,096 of them, dense and
  as successor lists; `mixed`: discounts .9, .99 and .999 in one call against the three apart; `orders`: alpha .5, 1.5, 2.
  Four methods: *vmapped hand*, `jit(vmap(while_loop))` of soft value iteration with a sup-norm stop; *careful hand*,
  relative value iteration with the lanes last, stopped by the span, whose answer is the midpoint; *loop*, `rr.solve`
  with `ROBUSTREG_KERNEL=0`; *solve*, `rr.solve` as it is. All are jitted functions of beta that return the values, as
  the hand-written ones do; *everything* is `rr.solve` with all that it returns.
* `sweep`: `rr.sweep` to a million cells. `single`: one problem, value and value with gradient, warm and first call.
* `states`: one MDP of up to ten million states. `rest`: gradients of many lanes, a game, a calibration, one-step layers.

Times are medians of warm calls to the end of their work. Values of every thousandth lane (five at least) are solved
again in float64 by NumPy, and must lie within the certified interval: `inside`. `rate` is how fast memory is copied and
products of matrices are formed on this device, measured in the same run. Every section runs by itself: one that fails
is reported, and the others go on.
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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import robustreg as rr  # noqa: E402  # the checkout's own

Row = dict[str, Any]
SMALL = False
CARD = "device cpu"


class Problem(NamedTuple):
    """A problem and how precisely to solve it.

    Attributes:
        name: of the table.
        mdp: in float32; `[M]` leading axes of distinct ones.
        tol: certified.
        betas: smallest and largest, log-spaced over the lanes of each MDP.
    """

    name: str
    mdp: Any
    tol: float
    betas: tuple[float, float] = (0.1, 300.0)

    def lanes(self, n: int) -> jax.Array:
        """Strengths of n lanes, `[n]` or `[M, n/M]`."""
        m = self.mdp.batch_shape[0] if self.mdp.batch_shape else 1
        row = np.geomspace(*self.betas, n // m, dtype=np.float32)
        return jnp.asarray(np.broadcast_to(row, (m, n // m)) if self.mdp.batch_shape else row)


# ------------------------------------------------------------------------------------------------------- by hand


def expectation(kernel: Any) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """`[S] -> [S, A]` as one writes it."""
    if isinstance(kernel, rr.Dense):
        return lambda p, v: jnp.einsum("sat,t->sa", p, v, precision="highest")
    return lambda p, v: jnp.sum(p * v[kernel.indices], axis=-1)


def vmapped_hand(problem: Problem) -> Callable[..., jax.Array]:
    """Soft value iteration of one lane, vmapped."""
    m, expect = problem.mdp, expectation(problem.mdp.transitions)
    g = float(m.discount)
    stop = problem.tol * (1 - g) / g

    def one(p: jax.Array, reward: jax.Array, beta: jax.Array) -> jax.Array:
        def step(state: Any) -> Any:
            v, _, k = state
            new = jax.nn.logsumexp(beta * (reward + g * expect(p, v)), axis=-1, b=1 / m.n_actions) / beta
            return new, jnp.max(jnp.abs(new - v)), k + 1

        start = (jnp.zeros(m.n_states, jnp.float32), jnp.float32(jnp.inf), 0)
        return lax.while_loop(lambda s: (s[1] > stop) & (s[2] < 100_000), step, start)[0]

    over = jax.vmap(one, (None, None, 0))
    over = jax.vmap(over, (0, 0, 0)) if m.batch_shape else over
    return functools.partial(jax.jit(over), m.transitions.probabilities, m.reward)


def careful_hand(problem: Problem) -> Callable[..., jax.Array]:
    """Relative value iteration of all lanes at once, lanes last, span stop, midpoint."""
    m, kernel = problem.mdp, problem.mdp.transitions
    g, n_actions, own = float(m.discount), m.n_actions, bool(m.batch_shape)
    spec = "msat,mtl->msal" if own else "sat,tl->sal"

    def expect(p: jax.Array, h: jax.Array) -> jax.Array:
        if isinstance(kernel, rr.Dense):
            return jnp.einsum(spec, p, h, precision="highest")
        rows = [p[..., k, None] * h[..., kernel.indices[..., k], :] for k in range(p.shape[-1])]
        return functools.reduce(jnp.add, rows)

    def run(p: jax.Array, reward: jax.Array, beta: jax.Array) -> jax.Array:
        beta = beta[..., None, :]

        def step(state: Any) -> Any:
            h, c, _, k = state
            q = reward[..., None] - (1 - g) * c[..., None, :] + g * expect(p, h)
            best = jnp.max(q, axis=-2)
            total = jnp.sum(jnp.exp(beta[..., None, :] * (q - best[..., None, :])), axis=-2)
            new = best + jnp.log(total / n_actions) / beta
            low, high = ((f(new - h, axis=-2, keepdims=True)) for f in (jnp.min, jnp.max))
            return new, c + g / (1 - g) * 0.5 * (low + high), g / (1 - g) * 0.5 * (high - low), k + 1

        def going(state: Any) -> jax.Array:
            return jnp.any(state[2] > problem.tol) & (state[3] < 100_000)

        zero = jnp.zeros_like(beta)
        start = (jnp.zeros(beta.shape[:-2] + (m.n_states, beta.shape[-1]), jnp.float32), zero, zero + jnp.inf, 0)
        h, c, *_ = lax.while_loop(going, step, start)
        return jnp.swapaxes(h + c, -1, -2)

    return functools.partial(jax.jit(run), kernel.probabilities, m.reward)


def answers(problem: Problem, everything: bool = False, order: float | None = None) -> Callable[..., Any]:
    """`rr.solve` as a function of beta: the values with their status and bounds, or all it returns."""
    m = problem.mdp
    if m.batch_shape:
        m = jax.tree.map(lambda x: x[:, None] if x.ndim and x.shape[0] == m.batch_shape[0] else x, m)

    def run(m: Any, beta: jax.Array) -> Any:
        reg = rr.kl(beta) if order is None else rr.alpha(jnp.float32(order), beta)
        sol = rr.solve(m, reg, tol=problem.tol)
        return sol if everything else (sol.value, sol.status, sol.gap)

    return functools.partial(jax.jit(run), m._prepared())


# ------------------------------------------------------------------------------------------------------- truth


def truth(mdp: Any, beta: float) -> np.ndarray:
    """The value in float64, `[S]`: Newton's method with a direct solve, in NumPy."""
    kernel, reward, g = mdp.transitions, np.asarray(mdp.reward, float), float(mdp.discount)
    p = np.asarray(kernel.probabilities, float)
    if not isinstance(kernel, rr.Dense):
        full = np.zeros(p.shape[:2] + p.shape[:1])
        states, actions = np.indices(p.shape[:2])
        np.add.at(full, (states[..., None], actions[..., None], np.asarray(kernel.indices)), p)
        p = full
    p, v = p / p.sum(-1, keepdims=True), np.zeros(len(p))
    for _ in range(100):
        q = reward + g * p @ v
        best = q.max(-1, keepdims=True)
        weight = np.exp(beta * (q - best))
        d = best[:, 0] + np.log(weight.mean(-1)) / beta - v
        policy = weight / weight.sum(-1, keepdims=True)
        v = v + np.linalg.solve(np.eye(len(v)) - g * np.einsum("sa,sat->st", policy, p), d)
        if np.abs(d).max() < 1e-9 * (1 - g):
            break
    return v


def inside(problem: Problem, betas: jax.Array, value: jax.Array, bound: Any) -> bool:
    """Whether lanes hold the truth within `bound` of their values, `bound [n]` or a number."""
    n = value.shape[0] if value.ndim == 2 else value.shape[0] * value.shape[1]
    lanes = np.unique(np.linspace(0, n - 1, min(40, max(5, n // 1000))).astype(int))
    lanes = lanes[:: max(1, len(lanes) * problem.mdp.n_states // 4000)]
    flat, bounds = value.reshape(n, -1), np.broadcast_to(np.asarray(bound), value.shape[:-1]).ravel()
    betas, each = np.asarray(betas).ravel(), n // (problem.mdp.batch_shape or (1,))[0]
    for i in lanes:
        m = problem.mdp
        if m.batch_shape:
            m = jax.tree.map(lambda x, i=i: x[i // each] if x.ndim and x.shape[0] == m.batch_shape[0] else x, m)
        if np.abs(np.asarray(flat[i], float) - truth(m, float(betas[i]))).max() > bounds[i] * (1 + 1e-6):
            return False
    return True


# ------------------------------------------------------------------------------------------------------- timing


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


def without_kernel(function: Callable[[], Any]) -> Any:
    """Call a function whose solves are left to the loop."""
    os.environ["ROBUSTREG_KERNEL"] = "0"
    try:
        return function()
    finally:
        del os.environ["ROBUSTREG_KERNEL"]


def compare(section: str, problem: Problem, n: int, methods: str = "vmapped,careful,loop,solve,everything") -> list[Row]:
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
        try:
            run = functools.partial(makers[method](), betas)
            both = (lambda run=run: (timed(run), run()))
            (seconds, first), found = without_kernel(both) if method == "loop" else both()
            row = {"section": section, "problem": problem.name, "lanes": n, "method": method, "seconds": seconds}
            row |= {"per_second": n / seconds, "first_s": first}
            if method in ("vmapped", "careful"):
                row["inside"] = inside(problem, betas, found, problem.tol)
            elif method in ("loop", "solve"):
                value, status, gap = found
                row |= {"inside": inside(problem, betas, value, gap / 2), "failed": int((status != 0).sum())}
            rows.append(show(row))
        except Exception as error:  # out of memory at the largest sizes, say
            rows.append(show({"section": section, "problem": problem.name, "lanes": n, "method": method} | said(error)))
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
    print(f"{head}{1e3 * row.get('seconds', np.nan):>11.3f} ms{rate}  {text}", flush=True)
    return row


# ------------------------------------------------------------------------------------------------------- sections


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
    for g in (*discounts, np.asarray(discounts)[:, None]):
        m = rr.problems.slippery_grid(size, g, dtype=np.float32)._prepared()
        seconds, _ = timed(lambda m=m: run(m))
        name = f"grid {size} {g:g}" if isinstance(g, float) else f"grid {size} together"
        row = {"section": "mixed", "problem": name, "lanes": n // 3 if isinstance(g, float) else n, "seconds": seconds}
        apart += seconds if isinstance(g, float) else 0
        rows.append(show(row if isinstance(g, float) else row | {"of_the_sum": seconds / apart}))
    return rows


def orders() -> list[Row]:
    """Alpha-divergences, with and without the kernel."""
    problem, n = (grid(4, 0.9, 1e-3), 8) if SMALL else (grid(16, 0.99, 1e-3), 4096)
    rows = []
    for order in (0.5, 1.5, 2.0):
        for method in ("loop", "solve"):
            run = functools.partial(answers(problem, order=order), problem.lanes(n))
            both = (lambda run=run: (timed(run), run()[1]))
            (seconds, first), status = without_kernel(both) if method == "loop" else both()
            row = {"section": "orders", "problem": f"{problem.name}, alpha {order}", "lanes": n, "method": method}
            row |= {"seconds": seconds, "per_second": n / seconds, "failed": int((status != 0).sum()), "first_s": first}
            rows.append(show(row))
    return rows


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
        m = make()._prepared()

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
        p = np.broadcast_to(np.float32([0.75, 0.25]), indices.shape)
        m = rr.mdp(rr.Successors(jnp.asarray(indices), jnp.asarray(p)), rng.random((n, 4), dtype=np.float32), 0.95)
        seconds, first = timed(lambda m=m: rr.solve(m, rr.kl(jnp.float32(3.0)), tol=1e-3).value, 3)
        row = {"section": "states", "problem": f"{n:,} states", "lanes": 1, "method": "solve", "seconds": seconds}
        rows.append(show(row | {"first_s": first}))
    return rows


def rest() -> list[Row]:
    """Gradients of many lanes, a game, a calibration, and the one-step layer."""
    size, n = (4, 4) if SMALL else (16, 1024)
    m = rr.problems.slippery_grid(size, 0.9, dtype=np.float32)._prepared()
    betas = jnp.asarray(np.geomspace(0.1, 300, n, dtype=np.float32))
    logits = jax.random.normal(jax.random.key(0), (8, 32) if SMALL else (1024, 32_000))
    total = jax.jit(jax.grad(lambda b: rr.solve(m, rr.kl(b), tol=1e-3).objective.sum()))
    calls: dict[str, Callable[[], Any]] = {
        f"gradient, {n} lanes": lambda: total(betas),
        "layer, softmax": functools.partial(jax.jit(jax.grad(lambda x: (jax.nn.softmax(x) ** 2).sum())), logits),
    }
    layers = {"KL": rr.kl(jnp.float32(1.0)), "alpha 1.5": rr.alpha(jnp.float32(1.5), jnp.float32(1.0))}
    for name, reg in layers.items():
        layer = jax.jit(jax.grad(lambda x, reg=reg: (reg.argmax(x) ** 2).sum()))
        calls[f"layer, {name}"] = functools.partial(layer, logits)
    rows = []
    for name, call in calls.items():
        seconds, first = timed(call)
        rows.append(show({"section": "rest", "method": name, "seconds": seconds, "first_s": first}))
    return rows


def rates() -> list[Row]:
    """Speed of memory and of arithmetic on this device."""
    x = jnp.ones(1 << (16 if SMALL else 29), jnp.float32)
    y = jnp.ones((64, 64) if SMALL else (8192, 8192), jnp.float32)
    copy, _ = timed(lambda run=jax.jit(lambda x: x + 1): run(x))
    product, _ = timed(lambda run=jax.jit(lambda y: jnp.matmul(y, y, precision="highest")): run(y))
    rows = [{"section": "rate", "method": "copy", "seconds": copy, "bytes_per_s": 2 * x.nbytes / copy}]
    rows += [{"section": "rate", "method": "float32 product", "seconds": product, "flop_per_s": 2 * y.shape[0] ** 3 / product}]
    return [show(row) for row in rows]


SECTIONS = {f.__name__: f for f in (grids, dense, mixed, orders, sweep, single, states, rest)}


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
    for section in [rates, *(SECTIONS[name] for name in options.sections.split(","))]:
        if time.time() - begin > options.budget:
            print(f"{section.__name__}: no time left", flush=True)
            continue
        try:
            rows = section()
        except Exception as error:  # the others are still worth having
            rows = [show({"section": section.__name__} | said(error))]
            traceback.print_exc()
        if options.json:
            with open(options.json, "a") as file:
                file.writelines(json.dumps(about | row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
