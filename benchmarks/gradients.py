"""What does the gradient of a regularised value cost, beside what one would write otherwise?

    python benchmarks/gradients.py [--dtype float64|float32] [--repeats 7] [--json FILE]     (extra: bench)

The gradient of `<initial, V*>` in the reward `[S, A]` and in beta, on a Garnet (S=500, A=8, 8 successors, beta 10),
the slippery 32x32 grid (beta 3) and a Garnet of 100,000 states (A=4, 3 successors, beta 10), all at discount .99 and
solved to an error of 1e-6. Beside it:

* unrolled: reverse mode through a scan of hand-written soft value iteration, with as many sweeps as guarantee 1e-6;
* optimistix: `fixed_point` with its implicit adjoint (LU of the Jacobian);
* jaxopt: `FixedPointIteration` with its implicit derivative (conjugate gradients on the normal equations).

The last two are run where they are installed, and where their memory allows. Runs are interleaved; times are medians
of warm calls; `memory` is the compiled program's scratch space; `error` is the largest deviation of the gradient in
the reward from that of a solve at full precision, relative to its largest entry.

Typical printout (2 shared CPU cores, float64, JAX 0.12.0):

    commit 9f3733c, device cpu, machine x86_64, jax 0.12.0.1
    Garnet: S=500 A=8 beta 10, 1804 sweeps
                                      ms   spread  of value  memory MB    error
      value                         2.69     2.01      1.0x       0.17
      value and gradient            3.30     1.49      1.2x       4.83    3e-09
      Hessian-vector product        5.83     2.01      2.2x       5.59
      unrolled                    438.73    19.34    163.1x     125.88    1e-08
      optimistix                  331.76    15.83    123.3x     124.02    9e-14
      jaxopt                      288.41    28.06    107.2x       0.33    2e-09
    slippery grid: S=1024 A=4 beta 3, 1403 sweeps
                                      ms   spread  of value  memory MB    error
      value                         1.69     1.61      1.0x       0.32
      value and gradient            2.79     0.62      1.6x      16.87    1e-06
      Hessian-vector product        4.04     1.13      2.4x      17.34
      unrolled                    171.87    17.10    101.5x     112.53    1e-05
      optimistix                  149.46    28.42     88.3x     104.09    4e-08
      jaxopt                      143.65    10.43     84.9x       0.30    3e-02
    large Garnet: S=100000 A=4 beta 10, 1800 sweeps
                                      ms   spread  of value  memory MB    error
      value                        76.51    12.76      1.0x      16.89
      value and gradient          133.60    30.52      1.7x      35.34    2e-07
      Hessian-vector product      219.77    22.33      2.9x      64.33
      jaxopt                    10792.74   866.44    141.1x      29.18    4e-08

(On a machine with other work beside it. Run by themselves, value and gradient take .7 and 1.4 ms on the Garnet and 1.0
and 1.7 ms on the grid. Megabytes beyond the Krylov vectors are for elimination, of lanes that Krylov steps fail on.)
"""

import argparse
import dataclasses
import importlib
import json
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

if __package__:
    from benchmarks.solvers import TOL, run_on, timed
else:
    from solvers import TOL, run_on, timed


def sweep(mdp: Any) -> Callable[..., jax.Array]:
    """Hand-written soft Bellman backup `(v, reward, beta) -> v`."""
    index, probability, discount = mdp.transitions.indices, mdp.transitions.probabilities, mdp.discount

    def backup(v: jax.Array, reward: jax.Array, beta: jax.Array) -> jax.Array:
        q = reward + discount * jnp.sum(probability * v[index], axis=-1)
        return jax.nn.logsumexp(beta * q, axis=-1, b=1 / reward.shape[1]) / beta

    return backup


def by_hand(mdp: Any, steps: int) -> Callable[..., jax.Array]:
    """Objective by an unrolled loop."""
    backup = sweep(mdp)

    def objective(reward: jax.Array, beta: jax.Array) -> jax.Array:
        start = jnp.zeros(mdp.n_states, reward.dtype)
        v, _ = jax.lax.scan(lambda v, _: (backup(v, reward, beta), None), start, length=steps)
        return mdp.initial @ v

    return objective


def peers(mdp: Any, steps: int) -> dict[str, Callable[..., jax.Array]]:
    """Objectives of the general fixed-point libraries that are installed."""
    backup, start = sweep(mdp), jnp.zeros(mdp.n_states, mdp.dtype)
    stop = TOL * (1 - float(mdp.discount)) / float(mdp.discount)
    found: dict[str, Callable[..., jax.Array]] = {}
    if (optimistix := optional("optimistix")) is not None and mdp.n_states < 10_000:

        def by_optimistix(reward: jax.Array, beta: jax.Array) -> jax.Array:
            solver = optimistix.FixedPointIteration(rtol=0.0, atol=stop)
            run = optimistix.fixed_point(
                lambda v, args: backup(v, *args), solver, start, args=(reward, beta), max_steps=2 * steps
            )
            return mdp.initial @ run.value

        found["optimistix"] = by_optimistix
    if (jaxopt := optional("jaxopt")) is not None:

        def by_jaxopt(reward: jax.Array, beta: jax.Array) -> jax.Array:
            solver = jaxopt.FixedPointIteration(backup, maxiter=2 * steps, tol=stop)
            return mdp.initial @ solver.run(start, reward, beta).params

        found["jaxopt"] = by_jaxopt
    return found


def optional(name: str) -> Any:
    """A library, or None where it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(name)
        except ImportError:
            return None


def sweeps(mdp: Any, beta: jax.Array) -> int:
    """Sweeps after which the sup-norm residual guarantees the tolerance."""
    backup, stop = sweep(mdp), TOL * (1 - mdp.discount) / mdp.discount

    def step(state: Any) -> Any:
        v, _, count = state
        new = backup(v, mdp.reward, beta)
        return new, jnp.max(jnp.abs(new - v)), count + 1

    start = (jnp.zeros(mdp.n_states, mdp.dtype), jnp.asarray(jnp.inf, mdp.dtype), 0)
    return int(jax.jit(lambda s: jax.lax.while_loop(lambda s: s[1] > stop, step, s))(start)[2])


def compare(name: str, mdp: Any, beta: float, repeats: int) -> list[dict[str, Any]]:
    """Rows of one problem."""
    import robustreg as rr

    def objective(reward: jax.Array, beta: jax.Array, tol: float | None = TOL) -> jax.Array:
        return rr.solve(dataclasses.replace(mdp, reward=reward), rr.kl(beta), tol=tol).objective

    point = (mdp.reward, jnp.asarray(beta, mdp.dtype))
    steps = sweeps(mdp, point[1])
    both = {"value and gradient": jax.value_and_grad(objective, (0, 1))}

    def curvature(reward: jax.Array, beta: jax.Array) -> Any:
        gradient = jax.grad(objective, (0, 1))
        return objective(reward, beta), jax.jvp(gradient, (reward, beta), (reward, beta))[1]

    functions: dict[str, Any] = {"value": lambda *x: (objective(*x), None)} | both
    functions["Hessian-vector product"] = curvature
    if mdp.n_states < 10_000:
        functions["unrolled"] = jax.value_and_grad(by_hand(mdp, steps), (0, 1))
    functions |= {peer: jax.value_and_grad(f, (0, 1)) for peer, f in peers(mdp, steps).items()}
    exact = np.asarray(jax.jit(jax.grad(lambda r: objective(r, point[1], None)))(point[0]))
    programs, first, times = {}, {}, {label: [] for label in functions}
    for label, function in functions.items():
        programs[label] = jax.jit(function).lower(*point).compile()
        first[label] = timed(lambda label=label: programs[label](*point))
    for _ in range(repeats):
        for label, program in programs.items():
            times[label].append(timed(lambda program=program: program(*point)))
    base = float(np.median(times["value"]))
    rows = []
    for label, program in programs.items():
        _, gradient = program(*point)
        error = None
        if gradient is not None and label != "Hessian-vector product":
            error = np.abs(np.asarray(gradient[0]) - exact).max() / np.abs(exact).max()
        rows.append(
            {
                "problem": name,
                "states": mdp.n_states,
                "actions": mdp.n_actions,
                "beta": beta,
                "discount": float(mdp.discount),
                "dtype": str(mdp.dtype),
                "what": label,
                "median_ms": 1e3 * float(np.median(times[label])),
                "spread_ms": 1e3 * float(np.ptp(times[label])),
                "of_value": float(np.median(np.array(times[label]) / base)),
                "memory_mb": program.memory_analysis().temp_size_in_bytes / 2**20,
                "error": None if error is None else float(error),
                "sweeps": steps,
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """A table of one problem."""
    head = rows[0]
    print(f"{head['problem']}: S={head['states']} A={head['actions']} beta {head['beta']:g}, {head['sweeps']} sweeps")
    print(f"  {'':<24}{'ms':>10}{'spread':>9}{'of value':>10}{'memory MB':>11}{'error':>9}")
    for row in rows:
        error = "" if row["error"] is None else f"{row['error']:.0e}"
        print(
            f"  {row['what']:<24}{row['median_ms']:>10.2f}{row['spread_ms']:>9.2f}{row['of_value']:>9.1f}x"
            f"{row['memory_mb']:>11.2f}{error:>9}"
        )


def main() -> None:
    """Run every problem, print the tables, and write JSON lines if asked to."""
    parser = argparse.ArgumentParser(description="cost of gradients")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float64")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", help="append JSON lines to this file")
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    from robustreg.problems import generators

    dtype = np.dtype(arguments.dtype)
    cases = [
        ("Garnet", generators.garnet(500, 8, 8, 0.99, seed=0, dtype=dtype), 10.0),
        ("slippery grid", generators.slippery_grid(32, 0.99, dtype=dtype), 3.0),
        ("large Garnet", generators.garnet(100_000, 4, 3, 0.99, seed=0, dtype=dtype), 10.0),
    ]
    about = run_on()
    for name, mdp, beta in cases:
        rows = compare(name, mdp, beta, arguments.repeats)
        show(rows)
        if arguments.json:
            with open(arguments.json, "a") as file:
                file.writelines(json.dumps(about | row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
