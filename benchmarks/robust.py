"""What do uncertain rewards and transitions cost: in value, on the grid of a paper, and in time, beside plain sweeps?

    python benchmarks/robust.py [--small] [--json FILE]     (extra: bench, for the conic programs)

*Grid* [Derman, Geist and Mannor 2021]: how far the value of the uniform policy moves, in the 2-norm over states, for a
ball of rewards, of transitions of any noise (r2), and of noise that sums to 0 (kappa). Published: .2498 for rewards and
7.573 (r2), 6.335 (kappa) for transitions at a radius of .01; .850 and .0086 (r2) at .001 and 1e-5.

*Time*: 20 sweeps of value iteration, which no case ends before, of 256 Garnets of 100 states and 20 actions, in
one batch, at a discount of .9 and radii of .1 over the largest that contracts; the ratio of each to the sweeps of the
same problem without uncertainty, median of interleaved runs. Published, for loops in Python [Kumar et al. 2022]: 1.2 to
2.2 for L1, L2 and Linf, 37 to 41 for L3 to L10.

*Exact sets*: the same ratio where rows stay probabilities, for p = 1 and infinity, in both precisions, and that of the
default solver to a certified error of 1e-4; these rows are written out. Then, to a certified error of 1e-6 with the
default solver, on a grid of 32 x 32 cells, whose rows are lists. And to 1e-8, on the paper's grid, beside sets in which
each pair has a radius of its own, those in which the actions of a state share one.

*Conic programs* [Derman, Geist and Mannor 2021]: the same grid with rewards (radius 1e-3) and transitions (1e-5)
uncertain, evaluated and improved by value iteration until values move by less than 1e-3, each backup a cone program per
state (evaluation: the rows of a state share the radius, and stay probabilities) or per pair (improvement), built once
and solved by Clarabel through cvxpy. Beside it stand `rr.evaluate` and `rr.solve` for R2 and for "exact", both to a
certified error of 1e-3. Published, of one Python process each: 50 s and 100 s, R2 .02 and .04 s.

Typical printout (2 shared CPU cores, JAX 0.12.0, quiet):

    what a set takes off the uniform policy's value on the grid
    radius 0.01   rewards 0.25   r2 7.585   kappa 6.337
    radius 0.001   rewards 0.025   r2 0.8512   kappa 0.6337
    radius 1e-05   rewards 0.00025   r2 0.00864   kappa 0.006337
    20 sweeps, relative to plain ones
    p 1   plain_s 1.36   rewards s 1.06   kappa sa 0.988   both s 1.06
    p 2   plain_s 1.33   rewards s 1.1   kappa sa 0.994   both s 1.07
    p inf   plain_s 1.33   rewards s 1.05   kappa sa 1.04   both s 1.07
    p 3   plain_s 1.34   rewards s 1.13   kappa sa 1.14   both s 1.29
    p 5   plain_s 1.3   rewards s 1.8   kappa sa 1.6   both s 2.42
    p 10   plain_s 1.34   rewards s 1.74   kappa sa 1.68   both s 2.42
    exact sets, rows written out
    dtype float32   solver 20 sweeps   plain_ms 818   exact 1 1.75   exact inf 1.34
    dtype float32   solver default   plain_ms 667   exact 1 1.89   exact inf 2.19
    dtype float64   solver 20 sweeps   plain_ms 1.46e+03   exact 1 3.17   exact inf 1.94
    dtype float64   solver default   plain_ms 1.27e+03   exact 1 2.17   exact inf 2.5
    exact sets on a grid
    set plain   ms 4.27   relative 1
    set exact 1   ms 7.52   relative 1.76
    set exact inf   ms 12.6   relative 2.94
    set exact kl   ms 52.5   relative 12.3
    exact sets whose actions share the radius
    p 2   regulariser none   plain_ms 2.74   own_ms 4.46   shared_ms 78.9   relative 17.7
    p 2   regulariser kl   plain_ms 2.38   own_ms 4.5   shared_ms 58.3   relative 13
    p kl   regulariser none   plain_ms 2.26   own_ms 5.35   shared_ms 109   relative 20.3
    p kl   regulariser kl   plain_ms 2.01   own_ms 5.53   shared_ms 85.7   relative 15.5
    beside conic programs
    what conic evaluation   seconds 3.48   rounds 67   moved 0.06008
    what R2 evaluation   seconds 0.0008359   moved 0.03364   times_faster 4163
    what exact evaluation   seconds 0.005784   moved 0.02841   times_faster 601.7
    what conic improvement   seconds 11.5   rounds 88   moved 0.1242
    what R2 improvement   seconds 0.0007533   moved 0.1503   times_faster 1.527e+04
    what exact improvement   seconds 0.0116   moved 0.07144   times_faster 991.3

(`moved` of the conic programs holds up to 1e-2 of where their iteration stopped. "exact" for p = 2 looks for the
strength of every pair's adversary at every backup. The rows beside conic programs are of another day, on a machine
twice as fast, before rows of p = 2 were found without sorting. Rows have ten successors; where they have all 100, of
which more than 13 are needed to fill an interval, 20 sweeps take 2.0 in float32 and 2.8 in float64.)
"""

import argparse
import functools
import importlib
import itertools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from solvers import commit  # noqa: E402

jax.config.update("jax_enable_x64", True)
import robustreg as rr  # noqa: E402

_EXACT: dict[Any, float] = {1: 0.05, float("inf"): 0.001}
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


def written_out(lanes, n_states, n_actions, runs):
    """Yield a row for each precision and solver: milliseconds without a set, and how many times that sets take."""
    sets = {"plain": None} | {f"exact {p}": rr.TransitionBall(b, p, "sa", "exact") for p, b in _EXACT.items()}
    solvers = {"20 sweeps": (rr.ValueIteration(), {"tol": 1e-13, "max_steps": 20}), "default": (None, {"tol": 1e-4})}
    for dtype in (np.float32, np.float64):
        many = rr.problems.garnets(lanes, n_states, n_actions, 10, discount=0.9, seed=0, dtype=dtype)
        for solver, (method, options) in solvers.items():
            taken = {name: [] for name in sets}
            for k in range(runs + 1):
                for name, ball in sets.items():
                    begin = time.perf_counter()
                    jax.block_until_ready(rr.solve(many, None, method, ambiguity=ball, **options).value)
                    taken[name] += [time.perf_counter() - begin] if k else []
            middle = {name: statistics.median(times) for name, times in taken.items()}
            row = {"dtype": dtype.__name__, "solver": solver, "plain_ms": 1e3 * middle["plain"]}
            yield row | {name: x / middle["plain"] for name, x in middle.items() if name != "plain"}


def on_a_grid(size, runs):
    """Yield a row for each exact set: milliseconds of a solve, and beside one without it."""
    m, reg = rr.problems.slippery_grid(size, 0.99), rr.kl(1.0)
    sets: dict[Any, float] = {1: 0.1, float("inf"): 0.01, "kl": 0.01}
    cases = {"plain": None} | {f"exact {p}": rr.TransitionBall(b, p, "sa", "exact") for p, b in sets.items()}
    taken = {name: [] for name in cases}
    for k in range(runs + 1):
        for name, ball in cases.items():
            begin = time.perf_counter()
            solution = rr.solve(m, reg, tol=1e-6, ambiguity=ball).raise_if_failed()
            jax.block_until_ready(solution.value)
            taken[name] += [time.perf_counter() - begin] if k else []
    middle = {name: 1e3 * statistics.median(times) for name, times in taken.items()}
    for name in middle:
        yield {"set": name, "ms": middle[name], "relative": middle[name] / middle["plain"]}


def shared(runs):
    """Yield a row for each exact set and regulariser: milliseconds of a solve of the paper's grid.

    Plain, with a radius for each pair (`own`), and with one for the actions of a state (`shared`).
    """
    m = grid()[0]
    for p, (name, reg) in itertools.product((2, "kl"), (("none", None), ("kl", rr.kl(1.0)))):
        sets = {"plain": None, "own": rr.TransitionBall(0.01, p, "sa", "exact")}
        sets["shared"] = rr.TransitionBall(0.01, p, "s", "exact")
        taken = {key: [] for key in sets}
        for k in range(runs + 1):
            for key, ball in sets.items():
                begin = time.perf_counter()
                jax.block_until_ready(rr.solve(m, reg, tol=1e-8, ambiguity=ball).raise_if_failed().value)
                taken[key] += [1e3 * (time.perf_counter() - begin)] if k else []
        middle = {f"{key}_ms": statistics.median(times) for key, times in taken.items()}
        yield {"p": p, "regulariser": name} | middle | {"relative": middle["shared_ms"] / middle["own_ms"]}


class Conic:
    """One cone program, solved again and again: what the worst reward and rows of a state leave."""

    def __init__(self, rows, reward_radius, radius, discount):
        cp: Any = importlib.import_module("cvxpy")

        n_actions, n_states = rows.shape
        noise, taken = cp.Variable(rows.shape), cp.Variable(n_actions)
        self.rows, self.weights = cp.Parameter(rows.shape), cp.Parameter((n_actions, n_states))
        self.policy = cp.Parameter(n_actions, nonneg=True)
        worth = cp.sum(cp.multiply(self.weights, noise)) + self.policy @ taken
        inside = [cp.norm(noise, "fro") <= radius, cp.norm(taken) <= reward_radius]
        whole = [cp.sum(noise, axis=1) == 0, self.rows + noise >= 0]
        self.program, self.discount, self.solver = cp.Problem(cp.Minimize(worth), inside + whole), discount, cp.CLARABEL

    def lost(self, rows, policy, value):
        """How much less the worst model gives than the nominal one."""
        self.rows.value, self.policy.value = rows, policy
        self.weights.value = self.discount * policy[:, None] * value[None]
        return self.program.solve(solver=self.solver)


def conic(rounds, reward_radius=1e-3, radius=1e-5):
    """Yield rows: seconds, and how far the value is from that without uncertainty."""
    m, policy = grid()
    P, reward, g = np.moveaxis(np.asarray(m.transitions.expect(np.eye(25))), 0, -1), np.asarray(m.reward), 0.9
    plain = {"evaluation": np.asarray(rr.evaluate(m, policy)), "improvement": np.asarray(rr.nominal_optimum(m))}
    state, pair = Conic(P[0], reward_radius, radius, g), Conic(P[0, :1], reward_radius, radius, g)

    def evaluated(v, s):
        return policy[s] @ (reward[s] + g * P[s] @ v) + state.lost(P[s], policy[s], v)

    def improved(v, s):
        one = np.ones(1)
        return max(reward[s, a] + g * P[s, a] @ v + pair.lost(P[s, a][None], one, v) for a in range(4))

    for name, backup in (("evaluation", evaluated), ("improvement", improved)):
        v, count, begin = np.zeros(25), 0, time.perf_counter()
        while count < rounds:
            new = np.array([backup(v, s) for s in range(25)])
            v, moved, count = new, np.abs(new - v).max(), count + 1
            if moved < 1e-3:
                break
        seconds = time.perf_counter() - begin
        yield {"what": f"conic {name}", "seconds": seconds, "rounds": count, "moved": np.linalg.norm(v - plain[name])}
        reg = rr.norm_ball(reward_radius)
        forms = {"R2": rr.TransitionBall(radius, 2, "s", "r2"), "exact": rr.TransitionBall(radius, 2, "sa", "exact")}
        for form, ball in forms.items():
            run = functools.partial(_run, m, policy if name == "evaluation" else None, reg, ball)
            value, times = np.asarray(run()), []
            for _ in range(20):
                begin = time.perf_counter()
                jax.block_until_ready(run())
                times.append(time.perf_counter() - begin)
            mine, moved = statistics.median(times), float(np.linalg.norm(value - plain[name]))
            yield {"what": f"{form} {name}", "seconds": mine, "moved": moved, "times_faster": seconds / mine}


def _run(m, policy, reg, ball):
    """Evaluate a policy, or find the best."""
    if policy is not None:
        return rr.evaluate(m, policy, reg, ambiguity=ball)
    return rr.solve(m, reg, tol=1e-3, ambiguity=ball).value


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
    for title, found in (
        ("exact sets, rows written out", written_out(*((4, 10, 3, 1) if arguments.small else (256, 100, 20, 5)))),
        ("exact sets on a grid", on_a_grid(*((6, 1) if arguments.small else (32, 9)))),
        ("exact sets whose actions share the radius", shared(1 if arguments.small else 9)),
    ):
        print("  " + title)
        for row in found:
            rows.append(row)
            print("  " + "   ".join(f"{name} {x if isinstance(x, str) else f'{x:.3g}'}" for name, x in row.items()))
    try:
        found = list(conic(1 if arguments.small else 1000))
    except ModuleNotFoundError as error:
        found = [{"what": f"no conic programs: {error}"}]
    print("  beside conic programs")
    for row in found:
        rows.append(row)
        print("  " + "   ".join(f"{name} {x if isinstance(x, str) else f'{x:.4g}'}" for name, x in row.items()))
    if arguments.json:
        with open(arguments.json, "a") as file:
            file.writelines(json.dumps(about | row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
