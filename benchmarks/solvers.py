"""How long does each solver take to a certified 1e-6, beside the twenty lines of JAX that one writes by hand?

    python benchmarks/solvers.py [--dtype float64|float32] [--repeats 7] [--json FILE]

Problems: a Garnet (S=500, A=8, 8 successors, discount .99, beta 10) and the slippery 32x32 grid of
`robustreg.problems.slippery_grid` at three settings. "By hand" is soft value iteration over the same successor lists,
`[S, A, K]` gathers and `logsumexp` in one `while_loop`, stopped where its sup-norm residual guarantees the same error.
Runs are interleaved, so that the ratios are taken within one run; times are medians of warm calls; `first` is the first
call in this process with compilation. Errors are against the direct Newton solution at full precision.

Typical printout (2 shared CPU cores, float64, JAX 0.12.0):

    commit ead7b9f, device cpu, machine x86_64, jax 0.12.0.1, robustreg 0.1.0
    Garnet: S=500 A=8 discount 0.99 beta 10
      solver                              ms   spread  speed-up   steps  certified    error  first s
      by hand                         212.18    48.25      1.0x    1804       none    1e-06     0.36
      automatic                         1.52     0.34    139.8x       7    1.4e-07    1e-08     0.66
      newton, krylov                    0.98     0.13    216.9x       7    1.4e-07    1e-08     0.77
      newton, direct                   23.41    12.41      9.1x       5    1.6e-13    0e+00     0.02
      modified policy iteration(5)      1.30     2.88    163.3x       5    2.2e-07    7e-08     0.46
      value iteration                   0.86     0.09    245.8x      17    6.2e-07    1e-07     0.47
      anderson(5)                       1.62     4.87    131.1x      17    4.9e-07    3e-08     0.83
    slippery grid: S=1024 A=4 discount 0.99 beta 3
      solver                              ms   spread  speed-up   steps  certified    error  first s
      by hand                          61.51     8.49      1.0x    1403       none    9e-07     0.18
      automatic                         1.72     0.33     35.7x       7    9.7e-07    8e-07     0.54
      newton, krylov                    1.26     0.15     48.9x       7    9.7e-07    8e-07     0.58
      newton, direct                  121.73    13.47      0.5x       6    7.8e-08    8e-08     0.12
      modified policy iteration(5)     10.31     7.62      6.0x     269    9.7e-07    1e-06     0.45
      value iteration                  26.87     5.19      2.3x    1339    9.9e-07    1e-06     0.43
      anderson(5)                      15.74     4.92      3.9x     259    8.7e-07    3e-07     0.78
    slippery grid: S=1024 A=4 discount 0.999 beta 0.1
      solver                              ms   spread  speed-up   steps  certified    error  first s
      by hand                         542.47    11.04      1.0x   12447       none    7e-07     0.65
      automatic                         2.41     0.11    225.4x       8    2.5e-07    2e-07     0.00
      newton, krylov                    1.76     0.20    308.7x       8    2.5e-07    2e-07     0.00
      newton, direct                  119.12    51.50      4.6x       6    2.9e-11    0e+00     0.12
      modified policy iteration(5)     63.21    17.14      8.6x    2393    1.0e-06    1e-06     0.06
      value iteration                 231.44     3.48      2.3x   11961    1.0e-06    1e-06     0.23
      anderson(5)                      29.29    10.91     18.5x     752    9.9e-07    8e-07     0.03
    slippery grid: S=1024 A=4 discount 0.999 beta 1
      solver                              ms   spread  speed-up   steps  certified    error  first s
      by hand                          89.92     3.75      1.0x    2390       none    9e-08     0.20
      automatic                         2.74     0.14     32.8x       9    6.1e-07    5e-07     0.00
      newton, krylov                    2.18     0.13     41.3x       9    6.1e-07    5e-07     0.00
      newton, direct                  140.09    43.53      0.6x       7    9.1e-07    9e-07     0.13
      modified policy iteration(5)     12.67     2.72      7.1x     466    9.6e-07    1e-06     0.01
      value iteration                  45.98     5.07      2.0x    2323    1.0e-06    1e-06     0.05
      anderson(5)                      49.33     8.81      1.8x     836    7.6e-07    1e-07     0.05
"""

import argparse
import importlib.metadata
import json
import platform
import subprocess
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

TOL = 1e-6


def by_hand(mdp: Any, beta: float) -> Callable[[], Any]:
    """Soft value iteration as one writes it: value and number of sweeps."""
    index, probability = mdp.transitions.indices, mdp.transitions.probabilities
    reward, discount = mdp.reward, mdp.discount
    n_actions = reward.shape[1]

    def sweep(v: jax.Array) -> jax.Array:
        q = reward + discount * jnp.sum(probability * v[index], axis=-1)
        return jax.nn.logsumexp(beta * q, axis=-1, b=1 / n_actions) / beta

    def unfinished(state: Any) -> jax.Array:
        return (state[1] > TOL * (1 - discount) / discount) & (state[2] < 1_000_000)

    def step(state: Any) -> Any:
        v, _, count = state
        new = sweep(v)
        return new, jnp.max(jnp.abs(new - v)), count + 1

    start = (jnp.zeros(mdp.n_states, reward.dtype), jnp.asarray(jnp.inf, reward.dtype), 0)
    run = jax.jit(lambda state: jax.lax.while_loop(unfinished, step, state))
    return lambda: run(start)


def timed(function: Callable[[], Any]) -> float:
    """Seconds of one call, to the end of its work."""
    begin = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - begin


def run_on(**more: Any) -> dict[str, Any]:
    """Where and of what a run is, with what `more` there is to say of it; printed, and for every line of JSON."""
    device = str(jax.devices()[0].device_kind)
    about = {"commit": commit(), "device": device, "machine": platform.machine(), "jax": jax.__version__} | more
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    return about


def commit() -> str:
    """Short hash of the checkout, or "unknown" outside one."""
    try:
        out = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return out.stdout.strip()


def compare(name: str, mdp: Any, beta: float, repeats: int) -> list[dict[str, Any]]:
    """Rows of one problem: one per solver and one for the hand-written loop."""
    import robustreg as rr

    reg = rr.kl(beta=beta)
    solvers = {
        "automatic": None,
        "newton, krylov": rr.Newton(),
        "newton, direct": rr.Newton(linear="direct"),
        "modified policy iteration(5)": rr.ModifiedPolicyIteration(5),
        "value iteration": rr.ValueIteration(),
        "anderson(5)": rr.Anderson(5),
    }
    runs: dict[str, Callable[[], Any]] = {"by hand": by_hand(mdp, beta)}
    for label, solver in solvers.items():
        runs[label] = lambda solver=solver: rr.solve(mdp, reg, solver, tol=TOL)
    truth = np.asarray(rr.solve(mdp, reg, rr.Newton(linear="direct")).value)
    first = {label: timed(run) for label, run in runs.items()}
    times: dict[str, list[float]] = {label: [] for label in runs}
    for _ in range(repeats):
        for label, run in runs.items():
            times[label].append(timed(run))
    base = float(np.median(times["by hand"]))
    rows = []
    for label, run in runs.items():
        out = run()
        value, steps = (out[0], out[2]) if label == "by hand" else (out.value, out.steps)
        median = float(np.median(times[label]))
        rows.append(
            {
                "problem": name,
                "solver": label,
                "states": mdp.n_states,
                "actions": mdp.n_actions,
                "beta": beta,
                "discount": float(mdp.discount),
                "dtype": str(mdp.dtype),
                "median_ms": 1e3 * median,
                "spread_ms": 1e3 * float(np.ptp(times[label])),
                "speedup": base / median,
                "first_s": first[label],
                "steps": int(steps),
                "certified": None if label == "by hand" else float(out.gap) / 2,
                "status": "-" if label == "by hand" else rr.Status(int(out.status)).name,
                "error": float(np.max(np.abs(np.asarray(value) - truth))),
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """A table of one problem."""
    head = rows[0]
    print(
        f"{head['problem']}: S={head['states']} A={head['actions']} discount {head['discount']:g} beta {head['beta']:g}"
    )
    print(
        f"  {'solver':<29}{'ms':>9}{'spread':>9}{'speed-up':>10}{'steps':>8}{'certified':>11}{'error':>9}{'first s':>9}"
    )
    for row in rows:
        bound = "none" if row["certified"] is None else f"{row['certified']:.1e}"
        flag = "" if row["status"] in ("-", "CONVERGED") else f"  {row['status']}"
        print(
            f"  {row['solver']:<29}{row['median_ms']:>9.2f}{row['spread_ms']:>9.2f}{row['speedup']:>9.1f}x"
            f"{row['steps']:>8}{bound:>11}{row['error']:>9.0e}{row['first_s']:>9.2f}{flag}"
        )


def main() -> None:
    """Run every problem, print the tables, and write JSON lines if asked to."""
    parser = argparse.ArgumentParser(description="time to a certified 1e-6, per solver")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float64")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", help="append JSON lines to this file")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    from robustreg.problems import generators

    dtype = np.dtype(arguments.dtype)
    cases = [("Garnet", generators.garnet(500, 8, 8, 0.99, seed=0, dtype=dtype), 10.0)]
    for discount, beta in ((0.99, 3.0), (0.999, 0.1), (0.999, 1.0)):
        cases.append(("slippery grid", generators.slippery_grid(32, discount, dtype=dtype), beta))
    about = run_on(robustreg=importlib.metadata.version("robustreg"))
    for name, mdp, beta in cases:
        rows = compare(name, mdp, beta, arguments.repeats)
        show(rows)
        if arguments.json:
            with open(arguments.json, "a") as file:
                file.writelines(json.dumps(about | row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
