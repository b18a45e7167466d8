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
* `cells`: cost of a cell from a thousand to a million (32x32 grid), and peak memory.
* `states`: one solve of a square grid with four moves and three successors each, at a discount of .9 that fixes how
  fast it mixes, certified to 1e-4, from a hundred to a million states.

Times are medians of warm calls, interleaved; peak memory is that of the process so far.

Typical printout (2 shared CPU cores, float32, JAX 0.12.0), put together of four runs on 2026-11-27:

    commit 3ba5390, device cpu, machine x86_64, jax 0.12.0.1, dtype float32
      problem                    tol    cells   sweep s   cells/s  by hand s          peer loop  peak MB
      slippery grid .9         1e-04        1     0.002       541       0.01     3.0x      2.0x      362
      slippery grid .9         1e-04       16     0.007      2373       0.02     2.7x      8.5x      397
      slippery grid .9         1e-04       64     0.010      6334       0.10     9.4x     22.6x      463
        of one rr.solve per cell: 0.34
      slippery grid .9         1e-04      256     0.032      7978       0.47    14.5x     28.6x      545
      slippery grid .9         1e-04     1024     0.043     23584       3.08    70.9x     84.1x      513
      slippery grid .99        1e-03        1     0.004       259       0.06    14.4x      9.9x      545
      slippery grid .99        1e-03       16     0.015      1089       0.18    11.9x     30.6x      545
      slippery grid .99        1e-03       64     0.019      3302       0.94    48.5x     94.4x      545
        of one rr.solve per cell: 0.28
      slippery grid .99        1e-03      256     0.050      5079       4.27    84.8x    138.7x      548
      slippery grid .99        1e-03     1024     0.112      9160      30.04   268.7x    257.6x      520
      slippery grid .999       3e-02        1     0.005       185       0.36    66.4x     44.7x      548
      slippery grid .999       3e-02       16     0.021       758       1.14    53.8x     59.7x      548
      slippery grid .999       3e-02       64     0.024      2689       6.13   257.5x    204.6x      549
        of one rr.solve per cell: 0.23
      slippery grid .999       3e-02      256     0.085      3002      32.18   377.4x    235.3x      549
      slippery grid .999       3e-02     1024     0.206      4971                        402.9x      520
      Garnet .99               1e-03        1     0.003       299       0.07    20.6x     20.5x      552
      Garnet .99               1e-03       16     0.007      2245       0.32    44.8x    164.0x      554
      Garnet .99               1e-03       64     0.009      7214       0.99   111.1x    536.8x      604
        of one rr.solve per cell: 0.23
      Garnet .99               1e-03      256     0.025     10290       6.18   248.4x    778.3x      674
      Garnet .99               1e-03     1024     0.062     16476      35.07   564.4x   1205.8x      678
      256 Garnets .99          1e-03      256     0.012     20985       0.46    38.0x                724
      256 Garnets .99          1e-03     1024     0.039     25957       2.02    51.1x                686
      32x32 grid               1e-03     1000     0.077     13055                                    374
      32x32 grid               1e-03    10000     0.608     16451                                    377
      32x32 grid               1e-03   100000     5.898     16955                                    384
      32x32 grid               1e-03  1000000    59.092     16923                                    412
        cost of a cell, over that in the smallest sweep: 0.77 to 1.00
      grid .9, 100 states      1e-04        1     0.000      3004                                    580
      grid .9, 1024 states     1e-04        1     0.000      2387                                    580
      grid .9, 10000 states    1e-04        1     0.002       578                                    624
      grid .9, 99856 states    1e-04        1     0.012        83                                    746
      grid .9, 1000000 states   1e-04        1     0.202         5                                   1918
        cost of a state, most states over 1e4: 1.17
      mixed discounts          3e-02      768     0.139      5519                                   1918
        of the three apart: 0.91

On one H100, on the same day, where a step of few lanes takes as long as one of a thousand (host memory in the last
column):

    commit 8fb84c6, device NVIDIA H100 80GB HBM3, machine x86_64, jax 0.11.2, dtype float32
      problem                    tol    cells   sweep s   cells/s  by hand s          peer loop  peak MB
      slippery grid .9         1e-04      256     0.014     18460       0.00     0.4x     35.0x     2782
      slippery grid .9         1e-04     4096     0.024    170773       0.04     1.6x    364.6x     2828
      slippery grid .99        1e-03      256     0.030      8595       0.05     1.6x    115.8x     2829
      slippery grid .99        1e-03     4096     0.079     51642       0.40     5.0x    802.1x     2831
      slippery grid .999       3e-02      256     0.056      4594       0.30     5.5x    200.9x     2833
      slippery grid .999       3e-02     4096     0.242     16918                        719.8x     2833
      Garnet .99               1e-03      256     0.009     28044       0.13    13.7x    964.5x     2857
      Garnet .99               1e-03     4096     0.019    215621       1.70    89.4x   6521.3x     2902
      256 Garnets .99          1e-03      256     0.008     31511       0.03     4.0x               3015
      256 Garnets .99          1e-03     4096     0.019    210716       0.03     1.4x               3135
      16x16 grid               1e-03     1000     0.022     46381                                   2727
      16x16 grid               1e-03    10000     0.035    284592                                   2753
      16x16 grid               1e-03   100000     0.103    969553                                   2785
      grid .9, 1000000 states   1e-04        1     0.005       195                                   4103
"""

import argparse
import json
import resource
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

if __package__:
    from benchmarks.gradients import optional
    from benchmarks.solvers import run_on, timed
else:
    from gradients import optional
    from solvers import run_on, timed

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
    from robustreg.problems import generators

    def grid(g: float) -> Any:
        return generators.slippery_grid(32, g, dtype=dtype)

    cases = [
        ("slippery grid .9", grid(0.9), (0.1, 300), 1e-4, 1),
        ("slippery grid .99", grid(0.99), (0.1, 300), 1e-3, 1),
        ("slippery grid .999", grid(0.999), (0.1, 300), 3e-2, 1),
        ("Garnet .99", generators.garnet(500, 8, 8, 0.99, dtype=dtype), (1, 100), 1e-3, 1),
        ("256 Garnets .99", generators.garnets(256, dtype=dtype), (1, 100), 1e-3, 256),
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
    from robustreg.problems import generators

    m, betas, tol = generators.slippery_grid(32, 0.99, dtype=dtype), np.geomspace(0.1, 300, 256), 3e-2
    discounts = (0.9, 0.99, 0.999)
    apart = {f"{g}": sweep(m, betas, tol, discount=[g]) for g in discounts}
    found = row("mixed discounts", 768, {"sweep": sweep(m, betas, tol, discount=list(discounts))} | apart, repeats)
    show(found | {"tol": tol})
    print(f"    of the three apart: {found['sweep'] / sum(found[g] for g in apart):.2f}")
    return [found]


def cells(dtype: Any, counts: list[int]) -> list[dict[str, Any]]:
    """Cost of a cell and peak memory by number of cells: a thousand betas by as many discounts in [.985, .99]."""
    from robustreg.problems import generators

    m = generators.slippery_grid(32, 0.99, dtype=dtype)
    found = []
    for count in counts:
        betas, discounts = np.geomspace(0.1, 300, 1000), np.linspace(0.985, 0.99, -(-count // 1000))
        runs = {"sweep": sweep(m, betas, 1e-3, discount=discounts)}
        found.append(row("32x32 grid", discounts.size * betas.size, runs, 1 if count >= 1e6 else 3, tol=1e-3))
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
    about = run_on(dtype=options.dtype)
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
