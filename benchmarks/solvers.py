"""How long does each solver take to a certified 1e-6, beside the twenty lines of JAX that one writes by hand?

    python benchmarks/solvers.py [--dtype float64|float32] [--repeats 7] [--json FILE]

Problems: a Garnet (S=500, A=8, 8 successors, discount .99, beta 10) and the slippery 32x32 grid of
`robustreg.problems.slippery_grid` at three settings. "By hand" is soft value iteration over the same successor lists,
`[S, A, K]` gathers and `logsumexp` in one `while_loop`, stopped where its sup-norm residual guarantees the same error.
Runs are interleaved, so that the ratios are taken within one run; times are medians of warm calls; `first` is the first
call in this process with compilation. Errors are against the direct Newton solution at full precision.

Typical printout (2 shared CPU cores, float64, JAX 0.10.2):

    commit f672072, device cpu, machine x86_64, jax 0.10.2, robustreg 0.1.0
    Garnet: S=500 A=8 discount 0.99 beta 10
      solver                              ms   spread  speed-up   steps  certified    error  first s
      by hand                         406.75    93.02      1.0x    1804       none    1e-06     0.59
      automatic                         3.02     1.33    134.6x       7    4.9e-08    8e-09     1.77
      newton, krylov                    2.62     1.33    155.2x       7    4.9e-08    8e-09     1.84
      newton, direct                  208.86    57.16      1.9x       5    1.6e-13    0e+00     0.22
      modified policy iteration(5)      2.54     1.44    160.1x       5    1.1e-07    7e-08     1.46
      value iteration                   1.97     0.94    206.2x      17    1.7e-07    1e-08     1.33
      anderson(5)                       3.09     5.12    131.7x      17    2.0e-07    8e-08     1.99
    slippery grid: S=1024 A=4 discount 0.99 beta 3
      solver                              ms   spread  speed-up   steps  certified    error  first s
      by hand                         219.42    97.40      1.0x    1403       none    9e-07     0.39
      automatic                         8.64     3.38     25.4x       7    9.4e-07    8e-07     1.54
      newton, krylov                    8.18     3.60     26.8x       7    9.4e-07    8e-07     1.82
      newton, direct                  662.50   119.08      0.3x       6    4.4e-08    8e-08     0.67
      modified policy iteration(5)     39.49    22.67      5.6x     269    9.6e-07    1e-06     1.22
      value iteration                  51.46    24.82      4.3x    1339    9.8e-07    1e-06     1.17
      anderson(5)                      30.66    19.96      7.2x     227    8.8e-07    3e-07     1.80
    slippery grid: S=1024 A=4 discount 0.999 beta 0.1
      solver                              ms   spread  speed-up   steps  certified    error  first s
      by hand                        1436.61   241.12      1.0x   12447       none    7e-07     2.04
      automatic                        11.62    11.93    123.6x       8    2.5e-07    3e-07     0.02
      newton, krylov                   11.19     5.03    128.4x       8    2.5e-07    3e-07     0.01
      newton, direct                 1665.23   665.64      0.9x       6    2.7e-11    0e+00     0.64
      modified policy iteration(5)    271.71    15.45      5.3x    2393    1.0e-06    1e-06     0.25
      value iteration                 402.98    58.96      3.6x   11961    1.0e-06    1e-06     0.48
      anderson(5)                     108.68    26.32     13.2x     864    9.4e-07    9e-07     0.09
    slippery grid: S=1024 A=4 discount 0.999 beta 1
      solver                              ms   spread  speed-up   steps  certified    error  first s
      by hand                         251.28    91.15      1.0x    2390       none    9e-08     0.43
      automatic                        14.24     5.94     17.7x       9    2.8e-07    2e-07     0.02
      newton, krylov                   13.89     8.40     18.1x       9    2.8e-07    2e-07     0.02
      newton, direct                  699.75   207.32      0.4x       7    6.0e-07    9e-07     0.76
      modified policy iteration(5)     44.75     7.40      5.6x     466    9.5e-07    1e-06     0.04
      value iteration                  78.22    18.02      3.2x    2323    9.9e-07    1e-06     0.07
      anderson(5)                      86.82   116.67      2.9x    1015    4.3e-07    3e-07     0.13
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
    from robustreg import problems

    dtype = np.dtype(arguments.dtype)
    cases = [("Garnet", problems.garnet(500, 8, 8, 0.99, seed=0, dtype=dtype), 10.0)]
    for discount, beta in ((0.99, 3.0), (0.999, 0.1), (0.999, 1.0)):
        cases.append(("slippery grid", problems.slippery_grid(32, discount, dtype=dtype), beta))
    about = {
        "commit": commit(),
        "device": str(jax.devices()[0].device_kind),
        "machine": platform.machine(),
        "jax": jax.__version__,
        "robustreg": importlib.metadata.version("robustreg"),
    }
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    for name, mdp, beta in cases:
        rows = compare(name, mdp, beta, arguments.repeats)
        show(rows)
        if arguments.json:
            with open(arguments.json, "a") as file:
                file.writelines(json.dumps(about | row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
