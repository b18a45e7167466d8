"""How many cells per second does a sweep solve, beside what one would write or install otherwise?

    python benchmarks/sweep.py [--sections against,mixed,cells,states] [--dtype float32|float64]
                               [--lanes 1,16,64,256,1024] [--cells 1000,10000,100000,1000000]
                               [--states 100,1000,10000,100000,1000000] [--repeats 3] [--json FILE]

* `against`: K cells of one problem, betas log-spaced in [.1, 300] (grids) or [1, 100] (Garnets), certified to the
  tolerance in the table: the slippery 32x32 grid at three discounts, a Garnet (S=500, A=8, 8 successors), and 256
  different Garnets (S=64, A=4) with K/256 betas each. "By hand" is `jax.jit(jax.vmap(...))` of soft value iteration,
  every lane stopped where its sup-norm residual guarantees the same error; where that would take minutes, it is run up
  to 256 cells. "Peer loop" is a Python loop of one compiled solve per cell by the quickest single-problem library that
  is installed and solves regularised problems (optimistix or jaxopt, extra: bench), timed on four cells, per cell.
* `mixed`: discounts .9, .99 and .999 in one sweep against the three apart.
* `cells`: cost of a cell from a thousand to a million (16x16 grid), and peak memory.
* `states`: one solve of a square grid with four moves and three successors each, at a discount of .9 that fixes how
  fast it mixes, certified to 1e-4, from a hundred to a million states.

Times are medians of warm calls, interleaved; peak memory is that of the process so far.

Typical printout (2 shared CPU cores, float32, JAX 0.12.0), put together of three runs: one for each half of the table,
and one for the ratios to `rr.solve`:

    commit b451a1a, device cpu, machine x86_64, jax 0.12.0.1, dtype float32
      problem                    tol    cells   sweep s   cells/s  by hand s          peer loop  peak MB
      slippery grid .9         1e-04        1     0.012        81       0.01     0.5x      0.3x      348
      slippery grid .9         1e-04       16     0.021       770       0.03     1.6x      2.8x      400
      slippery grid .9         1e-04       64     0.017      3764       0.12     7.3x     13.6x      455
        of one rr.solve per cell: 0.54
      slippery grid .9         1e-04      256     0.033      7876       0.51    15.8x     29.3x      505
      slippery grid .9         1e-04     1024     0.087     11749       3.35    38.4x     42.9x      584
      slippery grid .99        1e-03        1     0.024        42       0.06     2.4x      1.6x      584
      slippery grid .99        1e-03       16     0.027       583       0.31    11.3x     17.0x      584
      slippery grid .99        1e-03       64     0.069       925       1.01    14.6x     26.8x      584
        of one rr.solve per cell: 0.79
      slippery grid .99        1e-03      256     0.096      2677       5.26    55.0x     80.3x      584
      slippery grid .99        1e-03     1024     0.283      3615      32.08   113.2x    102.5x      586
      slippery grid .999       3e-02        1     0.016        61       0.38    23.2x     15.7x      586
      slippery grid .999       3e-02       16     0.039       413       1.70    43.8x     33.2x      586
      slippery grid .999       3e-02       64     0.099       648       7.66    77.5x     53.8x      586
        of one rr.solve per cell: 0.87
      slippery grid .999       3e-02      256     0.160      1602      31.61   197.9x    127.5x      586
      slippery grid .999       3e-02     1024     0.443      2309                        182.4x      586
      Garnet .99               1e-03        1     0.023        44       0.06     2.8x      2.8x      586
      Garnet .99               1e-03       16     0.006      2580       0.30    48.2x    187.5x      586
      Garnet .99               1e-03       64     0.010      6239       0.94    91.7x    477.3x      592
        of one rr.solve per cell: 0.25
      Garnet .99               1e-03      256     0.038      6687       6.65   173.8x    482.7x      702
      Garnet .99               1e-03     1024     0.087     11796      36.08   415.7x    859.3x      891
      256 Garnets .99          1e-03      256     0.031      8155       0.42    13.3x                891
      256 Garnets .99          1e-03     1024     0.049     20777       1.27    25.7x                891
      16x16 grid               1e-03     1000     0.028     35593                                    360
      16x16 grid               1e-03    10000     0.270     37051                                    390
      16x16 grid               1e-03   100000     2.504     39940                                    394
      16x16 grid               1e-03  1000000    26.701     37451                                    433
        cost of a cell, largest over smallest: 1.12
      grid .9, 100 states      1e-04        1     0.000      4020                                    439
      grid .9, 1024 states     1e-04        1     0.000      2564                                    441
      grid .9, 10000 states    1e-04        1     0.002       527                                    488
      grid .9, 99856 states    1e-04        1     0.010        96                                    608
      grid .9, 1000000 states   1e-04        1     0.236         4                                   1783
        cost of a state, most states over 1e4: 1.24
      mixed discounts          3e-02      768     0.230      3339                                   1783
        of the three apart: 0.99
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
    from benchmarks.gradients import optional
    from benchmarks.solvers import commit, timed
else:
    from gradients import optional
    from solvers import commit, timed

SECTIONS = ("against", "mixed", "cells", "states")
Soft = Callable[[jax.Array, jax.Array], jax.Array]


def backups(mdp: Any) -> tuple[Soft, int]:
    """Hand-written soft backup `(v, beta) -> v` of one MDP, or `[n, S]` at once of n, and its number of axes."""
    kernel, reward, g = mdp.transitions, mdp.reward, mdp.discount

    def backup(v: jax.Array, beta: jax.Array) -> jax.Array:
        if hasattr(kernel, "indices"):
            ahead = jnp.sum(kernel.probabilities * v[kernel.indices], axis=-1)
        else:
            ahead = jnp.einsum("nsat,nt->nsa", kernel.probabilities, v)
        q = reward + g * ahead
        return jax.nn.logsumexp(beta * q, axis=-1, b=1 / reward.shape[-1]) / beta

    return backup, reward.ndim - 1


def by_hand(mdp: Any, betas: np.ndarray, tol: float) -> Callable[[], Any]:
    """Vmapped soft value iteration as one writes it, a lane per beta (times the MDPs)."""
    backup, _ = backups(mdp)
    g = float(mdp.discount)

    def one(beta: jax.Array) -> Any:
        def step(state: Any) -> Any:
            v, _, count = state
            new = backup(v, beta)
            return new, jnp.max(jnp.abs(new - v)), count + 1

        def unfinished(state: Any) -> jax.Array:
            return (state[1] > tol * (1 - g) / g) & (state[2] < 100_000)

        start = (jnp.zeros(mdp.reward.shape[:-1], mdp.dtype), jnp.asarray(jnp.inf, mdp.dtype), 0)
        return jax.lax.while_loop(unfinished, step, start)

    run, lanes = jax.jit(jax.vmap(one)), jnp.asarray(betas, mdp.dtype)
    return lambda: run(lanes)


def peer_loop(mdp: Any, betas: np.ndarray, tol: float) -> tuple[str, Callable[[], Any]] | None:
    """A solve after the other by a library for fixed points; None where there is none, or many MDPs."""
    backup, axes = backups(mdp)
    g, start = float(mdp.discount), jnp.zeros(mdp.reward.shape[:-1], mdp.dtype)
    if axes > 1:
        return None
    stop = tol * (1 - g) / g
    if (optimistix := optional("optimistix")) is not None:
        name, solver = "optimistix", optimistix.FixedPointIteration(rtol=0.0, atol=stop)

        def one(beta: jax.Array) -> Any:
            return optimistix.fixed_point(backup, solver, start, args=beta, max_steps=100_000, throw=False).value

    elif (jaxopt := optional("jaxopt")) is not None:
        name, iteration = "jaxopt", jaxopt.FixedPointIteration(backup, maxiter=100_000, tol=stop)

        def one(beta: jax.Array) -> Any:
            return iteration.run(start, beta).params

    else:
        return None
    run, cells = jax.jit(one), [jnp.asarray(beta, mdp.dtype) for beta in betas]
    return name, lambda: [jax.block_until_ready(run(beta)) for beta in cells]


def sweep(mdp: Any, betas: np.ndarray, tol: float, **grid: Any) -> Callable[[], Any]:
    """A sweep whose every cell is certified, or an assertion fails."""
    import robustreg as rr

    def run() -> Any:
        table = rr.sweep(mdp, rr.kl(1.0), {"beta": betas} | grid, tol=tol, outputs=("objective", "gap", "status"))
        assert (table["status"] == rr.Status.CONVERGED).all() and (table["gap"] <= 2.001 * tol).all()
        return table["objective"]

    return run


def one_by_one(mdp: Any, betas: np.ndarray, tol: float) -> Callable[[], Any]:
    """The same cells by a compiled solve each."""
    import robustreg as rr

    cells = [rr.kl(np.asarray(beta, mdp.dtype)) for beta in betas]
    return lambda: [jax.block_until_ready(rr.solve(mdp, reg, tol=tol).value) for reg in cells]


def row(name: str, cells: int, runs: dict[str, Callable[[], Any]], repeats: int, **more: Any) -> dict[str, Any]:
    """Median seconds of each run, interleaved, warm."""
    for run in runs.values():
        timed(run)
    times: dict[str, list[float]] = {label: [] for label in runs}
    for _ in range(repeats):
        for label, run in runs.items():
            times[label].append(timed(run))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return (
        {"problem": name, "cells": cells, "peak_mb": peak} | {k: float(np.median(x)) for k, x in times.items()} | more
    )


def show(found: dict[str, Any]) -> None:
    """One line of the table."""
    hand, peer = found.get("by hand"), found.get("peer cell")
    ratios = [f"{x:>11.2f}{x / found['sweep']:>8.1f}x" if x else f"{'':>20}" for x in (hand,)]
    loop = f"{peer * found['cells'] / found['sweep']:>9.1f}x" if peer else f"{'':>10}"
    rate = found["cells"] / found["sweep"]
    print(
        f"  {found['problem']:<22}{found.get('tol', 0):>8.0e}{found['cells']:>9}{found['sweep']:>10.3f}"
        f"{rate:>10.0f}{ratios[0]}{loop}{found['peak_mb']:>9.0f}",
        flush=True,
    )


HEAD = f"  {'problem':<22}{'tol':>8}{'cells':>9}{'sweep s':>10}{'cells/s':>10}{'by hand s':>11}{'':>9}"
HEAD += f"{'peer loop':>10}{'peak MB':>9}"


def against(dtype: Any, lanes: list[int], repeats: int) -> list[dict[str, Any]]:
    """Sweeps of K cells against the same by hand, and a loop of a library."""
    from robustreg import problems

    def grid(g: float) -> Any:
        return problems.slippery_grid(32, g, dtype=dtype)

    cases = [
        ("slippery grid .9", grid(0.9), (0.1, 300), 1e-4, 1),
        ("slippery grid .99", grid(0.99), (0.1, 300), 1e-3, 1),
        ("slippery grid .999", grid(0.999), (0.1, 300), 3e-2, 1),
        ("Garnet .99", problems.garnet(500, 8, 8, 0.99, dtype=dtype), (1, 100), 1e-3, 1),
        ("256 Garnets .99", problems.garnets(256, dtype=dtype), (1, 100), 1e-3, 256),
    ]
    found = []
    for name, m, (low, high), tol, size in cases:
        for k in (k for k in lanes if k >= size):
            betas = np.geomspace(low, high, k // size)
            runs = {"sweep": sweep(m, betas, tol)}
            if k <= 256 or "999" not in name:
                runs["by hand"] = by_hand(m, betas, tol)
            more: dict[str, Any] = {"tol": tol}
            sample = np.geomspace(low, high, min(k, 4))
            if (peer := peer_loop(m, sample, tol)) is not None:
                timed(peer[1])
                more |= {"peer": peer[0], "peer cell": timed(peer[1]) / sample.size}
            if k == 64:
                runs["one by one"] = one_by_one(m, betas, tol)
            found.append(row(name, k, runs, repeats, **more))
            show(found[-1])
            if k == 64:
                print(f"    of one rr.solve per cell: {found[-1]['sweep'] / found[-1]['one by one']:.2f}")
    return found


def mixed(dtype: Any, repeats: int) -> list[dict[str, Any]]:
    """Three discounts in one sweep against the three apart."""
    from robustreg import problems

    m, betas, tol = problems.slippery_grid(32, 0.99, dtype=dtype), np.geomspace(0.1, 300, 256), 3e-2
    discounts = (0.9, 0.99, 0.999)
    apart = {f"{g}": sweep(m, betas, tol, discount=[g]) for g in discounts}
    found = row("mixed discounts", 768, {"sweep": sweep(m, betas, tol, discount=list(discounts))} | apart, repeats)
    show(found | {"tol": tol})
    print(f"    of the three apart: {found['sweep'] / sum(found[g] for g in apart):.2f}")
    return [found]


def cells(dtype: Any, counts: list[int]) -> list[dict[str, Any]]:
    """Cost of a cell and peak memory by number of cells: a thousand betas by as many discounts in [.985, .99]."""
    from robustreg import problems

    m = problems.slippery_grid(16, 0.99, dtype=dtype)
    found = []
    for count in counts:
        betas, discounts = np.geomspace(0.1, 300, 1000), np.linspace(0.985, 0.99, -(-count // 1000))
        runs = {"sweep": sweep(m, betas, 1e-3, discount=discounts)}
        found.append(row("16x16 grid", discounts.size * betas.size, runs, 1 if count >= 1e6 else 3, tol=1e-3))
        show(found[-1])
    costs = [x["sweep"] / x["cells"] for x in found]
    least, most = (end(costs) / costs[0] for end in (min, max))
    print(f"    cost of a cell, over that in the smallest sweep: {least:.2f} to {most:.2f}")
    return found


def states(dtype: Any, counts: list[int], repeats: int) -> list[dict[str, Any]]:
    """Time of a single solve by number of states."""
    import robustreg as rr

    found = []
    for count in counts:
        m, reg = rr.problems.slippery_grid(round(count**0.5), 0.9, dtype=dtype), rr.kl(3.0)

        def run(m: Any = m, reg: Any = reg) -> Any:
            return rr.solve(m, reg, tol=1e-4).raise_if_failed().value

        found.append(row(f"grid .9, {m.n_states} states", 1, {"sweep": run}, repeats, tol=1e-4, states=m.n_states))
        show(found[-1])
    costs = {x["states"]: x["sweep"] / x["states"] for x in found}
    large = [costs[n] for n in costs if n >= 9_000]
    if len(large) > 1:
        print(f"    cost of a state, most states over 1e4: {large[-1] / large[0]:.2f}")
    return found


def numbers(text: str) -> list[int]:
    """`1,16,64` as numbers."""
    return [int(float(x)) for x in text.split(",")]


def main() -> None:
    """Run the sections, print the table, and write JSON lines if asked to."""
    parser = argparse.ArgumentParser(description="cells per second of a sweep")
    parser.add_argument("--sections", default=",".join(SECTIONS))
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--lanes", type=numbers, default=[1, 16, 64, 256, 1024])
    parser.add_argument("--cells", type=numbers, default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--states", type=numbers, default=[100, 1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", help="append JSON lines to this file")
    options = parser.parse_args()
    wanted = options.sections.split(",")
    if unknown := [name for name in wanted if name not in SECTIONS]:
        parser.error(f"no section {unknown[0]!r}; there are: {', '.join(SECTIONS)}")
    jax.config.update("jax_enable_x64", options.dtype == "float64")
    dtype = np.dtype(options.dtype)
    about = {"commit": commit(), "device": str(jax.devices()[0].device_kind), "machine": platform.machine()}
    about |= {"jax": jax.__version__, "dtype": options.dtype}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(HEAD)
    sections: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "against": lambda: against(dtype, options.lanes, options.repeats),
        "mixed": lambda: mixed(dtype, options.repeats),
        "cells": lambda: cells(dtype, options.cells),
        "states": lambda: states(dtype, options.states, options.repeats),
    }
    rows = [found for name in wanted for found in sections[name]()]
    if options.json:
        with open(options.json, "a") as file:
            file.writelines(json.dumps(about | found) + "\n" for found in rows)


if __name__ == "__main__":
    main()
