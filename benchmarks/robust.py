"""What do uncertain rewards and transitions cost: in value, on the grid of a paper, and in time, beside plain sweeps?

    python benchmarks/robust.py [--small] [--json FILE]

*Grid* [Derman, Geist and Mannor 2021]: how far the value of the uniform policy moves, in the 2-norm over states, for a
ball of rewards, of transitions of any noise (r2), and of noise that sums to 0 (kappa). Published: .2498 for rewards and
7.573 (r2), 6.335 (kappa) for transitions at a radius of .01; .850 and .0086 (r2) at .001 and 1e-5.

*Time*: 20 sweeps of value iteration, which no case ends before, of 256 Garnets of 100 states and 20 actions, in
one batch, at a discount of .9 and radii of .1 over the largest that contracts; the ratio of each to the sweeps of the
same problem without uncertainty, median of interleaved runs. Published, for loops in Python [Kumar et al. 2022]: 1.2 to
2.2 for L1, L2 and Linf, 37 to 41 for L3 to L10.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from solvers import commit  # noqa: E402

jax.config.update("jax_enable_x64", True)
import robustreg as rr  # noqa: E402

NORMS = (1, 2, float("inf"), 3, 5, 10)


def grid():
    """The 5 x 5 grid of the paper, and its uniform policy."""
    P, reward = np.zeros((25, 4, 25)), np.zeros((25, 4))
    for s in range(25):
        for a in range(4):
            for b, (di, dj) in enumerate([(-1, 0), (0, 1), (1, 0), (0, -1)]):
                i, j = min(max(s // 5 + di, 0), 4), min(max(s % 5 + dj, 0), 4)
                P[s, a, 5 * i + j] += 0.925 if a == b else 0.025
    P[0], P[0, :, 0], reward[0], reward[4] = 0, 1, 1, 10
    return rr.mdp(P, reward, discount=0.9, layout="sas"), np.full((25, 4), 0.25)


def distances():
    """Yield a row for each radius: what each set takes off."""
    m, policy = grid()
    plain = np.asarray(rr.evaluate(m, policy))
    for radius in (1e-2, 1e-3, 1e-5):
        sets = {
            "rewards": (rr.norm_ball(radius), None),
            "r2": (None, rr.TransitionBall(radius, form="r2")),
            "kappa": (None, rr.TransitionBall(radius, form="kappa")),
        }
        values = {name: rr.evaluate(m, policy, reg, ambiguity=ball) for name, (reg, ball) in sets.items()}
        yield {"radius": radius} | {name: float(np.linalg.norm(v - plain)) for name, v in values.items()}


def timings(lanes, n_states, n_actions, runs):
    """Yield a row for each norm: seconds of plain sweeps, and ratios to them."""
    many = rr.problems.garnets(lanes, n_states, n_actions, 10, discount=0.9, seed=0)
    sweeps = rr.ValueIteration()

    def once(reg, ball):
        begin = time.perf_counter()
        jax.block_until_ready(rr.solve(many, reg, sweeps, tol=1e-13, max_steps=20, ambiguity=ball).value)
        return time.perf_counter() - begin

    for p in NORMS:
        width = n_states ** (1 - 1 / p)
        radius = 0.1 * (1 / 0.9 - 1) / width
        cases = {
            "plain": (None, None),
            "rewards s": (rr.norm_ball(0.1, p), None),
            "kappa sa": (None, rr.TransitionBall(radius, p, "sa")),
            "both s": (rr.norm_ball(0.1, p), rr.TransitionBall(radius, p, "s")),
        }
        for case in cases.values():
            once(*case)  # compiles
        taken = {name: [] for name in cases}
        for _ in range(runs):
            for name, case in cases.items():
                taken[name].append(once(*case))
        middle = {name: statistics.median(times) for name, times in taken.items()}
        yield {"p": p, "plain_s": middle["plain"]} | {n: middle[n] / middle["plain"] for n in middle if n != "plain"}


def main() -> None:
    """Print both tables, append their rows to a file if asked to."""
    parser = argparse.ArgumentParser(description="uncertain rewards and transitions: distances and times")
    parser.add_argument("--small", action="store_true", help="a few small problems, once")
    parser.add_argument("--json", help="append one JSON line per row to this file")
    arguments = parser.parse_args()
    about = {"commit": commit(), "device": jax.devices()[0].device_kind, "jax": jax.__version__}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    rows = []
    print("  what a set takes off the uniform policy's value on the grid")
    for row in distances():
        rows.append(row)
        print("  " + "   ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
    print("  20 sweeps, relative to plain ones")
    for row in timings(*((4, 10, 3, 1) if arguments.small else (256, 100, 20, 5))):
        rows.append(row)
        print("  " + "   ".join(f"{name} {value:.3g}" for name, value in row.items()), flush=True)
    if arguments.json:
        with open(arguments.json, "a") as file:
            file.writelines(json.dumps(about | row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
