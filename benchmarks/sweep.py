"""How many cells per second does a sweep solve, beside vmapped soft value iteration written by hand?

    python benchmarks/sweep.py [--cells 256] [--repeats 3] [--json FILE]

"By hand" is `jax.jit(jax.vmap(...))` of soft value iteration over the same successor lists, every lane stopped where
its sup-norm residual guarantees the error that the sweep certifies. Rows: `cells` values of beta, log-spaced in
[.1, 300] for the slippery 32x32 grid and in [1, 100] for a Garnet (S=500, A=8, 8 successors), float32; then discounts
.9, .99 and .999 mixed in one sweep against the three apart, and cells per second for 16 to 16,384 cells. Times are
medians of warm calls, interleaved; peak memory is that of the process so far.

Typical printout (2 shared CPU cores, float32, JAX 0.10.2):

    commit 399c697, device cpu, machine x86_64, jax 0.10.2
      problem                       cells  by hand s  sweep s  speed-up   cells/s  peak MB
      slippery grid .99               256      14.31     0.45     31.7x       567      400
      slippery grid .999              256      51.91     0.50    104.3x       515      401
      Garnet .99                      256      11.71     0.07    161.9x      3539      458
      mixed discounts                 768                0.77                1003      459
        of the three apart: 1.05
      slippery grid .99                16                0.06                 248      463
      slippery grid .99               256                0.26                 989      463
      slippery grid .99              4096                3.09                1325      482
      slippery grid .99             16384                9.48                1728      485
"""

import argparse
import json
import platform
import resource
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

if __package__:
    from benchmarks.solvers import commit, timed
else:
    from solvers import commit, timed


def by_hand(mdp: Any, betas: np.ndarray, tol: float) -> Callable[[], Any]:
    """Vmapped soft value iteration as one writes it."""
    index, probability, reward, g = (
        mdp.transitions.indices,
        mdp.transitions.probabilities,
        mdp.reward,
        mdp.discount,
    )

    def one(beta: jax.Array) -> Any:
        def step(state: Any) -> Any:
            v, _, count = state
            q = reward + g * jnp.sum(probability * v[index], axis=-1)
            new = jax.nn.logsumexp(beta * q, axis=-1, b=1 / reward.shape[1]) / beta
            return new, jnp.max(jnp.abs(new - v)), count + 1

        def unfinished(state: Any) -> jax.Array:
            return (state[1] > tol * (1 - g) / g) & (state[2] < 100_000)

        start = (jnp.zeros(mdp.n_states, reward.dtype), jnp.asarray(jnp.inf, reward.dtype), 0)
        return jax.lax.while_loop(unfinished, step, start)

    run, lanes = jax.jit(jax.vmap(one)), jnp.asarray(betas, reward.dtype)
    return lambda: run(lanes)


def row(name: str, cells: int, runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Any]:
    """Median seconds of each run, interleaved, warm."""
    for run in runs.values():
        timed(run)
    times: dict[str, list[float]] = {label: [] for label in runs}
    for _ in range(repeats):
        for label, run in runs.items():
            times[label].append(timed(run))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds = {label: float(np.median(x)) for label, x in times.items()}
    return {"problem": name, "cells": cells, "peak_mb": peak, **seconds}


def main() -> None:
    """Run every row, print the table, and write JSON lines if asked to."""
    parser = argparse.ArgumentParser(description="cells per second of a sweep")
    parser.add_argument("--cells", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="append JSON lines to this file")
    arguments = parser.parse_args()
    import robustreg as rr

    def sweep(m: Any, betas: Any, tol: float, **grid: Any) -> Callable[[], Any]:
        def run() -> Any:
            table = rr.sweep(m, rr.kl(1.0), {"beta": betas} | grid, tol=tol, outputs=("objective", "gap", "status"))
            assert (table["status"] == rr.Status.CONVERGED).all() and (table["gap"] <= 2.001 * tol).all()
            return table["objective"]

        return run

    about = {"commit": commit(), "device": str(jax.devices()[0].device_kind), "machine": platform.machine()}
    about["jax"] = jax.__version__
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"  {'problem':<28}{'cells':>7}{'by hand s':>11}{'sweep s':>9}{'speed-up':>10}{'cells/s':>10}{'peak MB':>9}")
    n, dtype = arguments.cells, np.float32
    grid_betas, garnet_betas = np.geomspace(0.1, 300, n), np.geomspace(1, 100, n)
    cases = [
        ("slippery grid .99", rr.problems.slippery_grid(32, 0.99, dtype=dtype), grid_betas, 1e-3),
        ("slippery grid .999", rr.problems.slippery_grid(32, 0.999, dtype=dtype), grid_betas, 3e-2),
        ("Garnet .99", rr.problems.garnet(500, 8, 8, 0.99, dtype=dtype), garnet_betas, 1e-3),
    ]
    rows = []

    def show(found: dict[str, Any]) -> None:
        rows.append(found)
        hand = found.get("by hand")
        left = f"{hand:>11.2f}" if hand else f"{'':>11}"
        ratio = f"{hand / found['sweep']:>9.1f}x" if hand else f"{'':>10}"
        rate = found["cells"] / found["sweep"]
        print(
            f"  {found['problem']:<28}{found['cells']:>7}{left}{found['sweep']:>9.2f}{ratio}{rate:>10.0f}"
            f"{found['peak_mb']:>9.0f}"
        )

    for name, m, betas, tol in cases:
        runs = {"sweep": sweep(m, betas, tol), "by hand": by_hand(m, betas, tol)}
        show(row(name, n, runs, arguments.repeats))
    m, discounts = cases[0][1], (0.9, 0.99, 0.999)
    apart = {f"{g}": sweep(m, grid_betas, 3e-2, discount=[g]) for g in discounts}
    mixed = row("mixed discounts", 3 * n, {"sweep": sweep(m, grid_betas, 3e-2, discount=list(discounts))} | apart, 3)
    show(mixed)
    print(f"    of the three apart: {mixed['sweep'] / sum(mixed[g] for g in apart):.2f}")
    for count in (16, 256, 4096, 16384):
        show(row("slippery grid .99", count, {"sweep": sweep(m, np.geomspace(0.1, 300, count), 1e-3)}, 1))
    if arguments.json:
        with open(arguments.json, "a") as file:
            file.writelines(json.dumps(about | found) + "\n" for found in rows)


if __name__ == "__main__":
    main()
