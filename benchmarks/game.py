"""How many rounds, and how long, does explicit play need until its bounds are within 1e-4 of each other?

    python benchmarks/game.py [--tol 1e-4] [--garnets 64] [--json FILE]

Each problem under alpha in {.5, 1, 2} and beta in {.5, 5, 50}, discount .99, nine lanes (or nine times the Garnets)
in one batch, with the defaults of `robustreg.solve_game`. `gap` is the largest (dual - primal)/|V*| of the lanes,
V* from `robustreg.solve`; `first` is the first call in this process with compilation, `warm` the second.

A printout (2 shared CPU cores, float64):

    commit ead7b9f, device cpu, jax 0.12.0.1
      problem          lanes  converged  steps  most      gap  first s   warm s
      FrozenLake 8x8       9          9      5     5    2e-05     8.49     0.02
      grid world           9          9     10    15    2e-06    10.18     0.08
      64 Garnets         576        576      5    10    3e-05     6.58     2.59
"""

import argparse
import json
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from solvers import commit  # noqa: E402  # a benchmark beside this one

GRID = Path(__file__).parent.parent / "configs" / "grid_world.toml"


def problems(garnets: int) -> dict[str, Any]:
    """The three problems by name."""
    import gymnasium

    import robustreg as rr

    drawn = tomllib.loads(GRID.read_text())["problem"]
    drawn.pop("kind")
    lake = gymnasium.make("FrozenLake-v1", map_name="8x8")
    return {
        "FrozenLake 8x8": rr.from_gymnasium(lake, discount=0.99),
        "grid world": rr.problems.grid_world(**drawn),
        f"{garnets} Garnets": rr.problems.garnets(garnets, 64, 4, 5, 0.99),
    }


def play(name: str, mdp: Any, tol: float) -> dict[str, Any]:
    """Rounds, times and gap of one problem."""
    import robustreg as rr

    alpha, beta = (x.ravel() for x in np.meshgrid([0.5, 1.0, 2.0], [0.5, 5.0, 50.0], indexing="ij"))
    lanes = (slice(None),) + (None,) * len(mdp.batch_shape)
    reg = rr.alpha(alpha=alpha[lanes], beta=beta[lanes])
    times = []
    for _ in range(2):
        begin = time.perf_counter()
        game = jax.block_until_ready(rr.solve_game(mdp, reg, tol=tol))
        times.append(time.perf_counter() - begin)
    value = np.asarray(rr.solve(mdp, reg).objective)
    steps, gap = np.asarray(game.steps), np.asarray(game.gap) / np.abs(value)
    return {
        "problem": name,
        "lanes": steps.size,
        "median_steps": float(np.median(steps)),
        "most_steps": int(steps.max()),
        "gap": float(gap.max()),
        "converged": int(np.asarray(game.converged).sum()),
        "first_s": times[0],
        "warm_s": times[1],
    }


def main() -> None:
    """Play every problem, print the table, and write JSON lines if asked to."""
    parser = argparse.ArgumentParser(description="rounds and time of explicit play to a given gap")
    parser.add_argument("--tol", type=float, default=1e-4)
    parser.add_argument("--garnets", type=int, default=64)
    parser.add_argument("--json", help="append JSON lines to this file")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    about = {"commit": commit(), "device": str(jax.devices()[0].device_kind), "jax": jax.__version__}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"  {'problem':<16}{'lanes':>6}{'converged':>11}{'steps':>7}{'most':>6}{'gap':>9}{'first s':>9}{'warm s':>9}")
    for name, mdp in problems(arguments.garnets).items():
        row = play(name, mdp, arguments.tol)
        print(
            f"  {name:<16}{row['lanes']:>6}{row['converged']:>11}{row['median_steps']:>7.0f}{row['most_steps']:>6}"
            f"{row['gap']:>9.0e}{row['first_s']:>9.2f}{row['warm_s']:>9.2f}"
        )
        if arguments.json:
            with open(arguments.json, "a") as file:
                file.write(json.dumps(about | row) + "\n")


if __name__ == "__main__":
    main()
