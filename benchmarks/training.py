"""What does a training step cost that differentiates through a solve: cold, warm, and as one would write it otherwise?

    python benchmarks/training.py [--size 16] [--discount 0.99] [--repeats 7] [--small] [--json FILE]  (extra: bench)

Maximum-entropy inverse reinforcement learning (`robustreg example irl`): the reward of a slippery grid is `<w, f(s)>`
with eight features, and a step is Adam's (rate 1e-3) on `J(w) - <w, seen>`, whose gradient is the derivative of a
solve. Weights begin a tenth, at random, from those that the features seen belong to. 200 steps are one compiled
`lax.scan`; times are per step, medians of warm, interleaved runs. Every method solves to a certified error of 1e-6 at
every step:

* cold: `rr.solve(m, reg)`; the MDP is closed over by the program;
* last value: with `init=` the last value; last solution: and its visits; line, parabola, cubic: with `init=` what the
  last two, three and four solutions and their visits lead to (`Solution.extrapolated`);
* argument: the cubic, with the MDP as an argument of the program instead, `prepared()` for it;
* by hand, implicit: soft value iteration with the span stop, warm, and the gradient as the occupancy of the policy,
  likewise by iteration: what a good engineer writes who knows both identities;
* unrolled: reverse mode through a scan of soft value iteration, with the sweeps that guarantee the error from zero;
* optimistix: `fixed_point` with its implicit adjoint, warm;
* PyTorch: unrolled, on the CPU, in float64.

The last two run where they are installed. `error` is the largest deviation of the weights after all steps from those
of solves at full precision, relative to the largest weight (Adam divides gradients by their size: small ones count).

Typical printout (2 shared CPU cores, JAX 0.12.0):

    S=256 discount 0.99, 1828 sweeps from zero
                           ms per step   spread  of cold  compile s    error
      cold                       0.466    0.071    1.00x        2.4  1.2e-05
      last value                 0.279    0.070    0.60x        2.4  2.6e-05
      last solution              0.271    0.062    0.58x        2.7    4e-05
      line                       0.231    0.093    0.50x        2.7    2e-06
      parabola                   0.163    0.043    0.35x        2.8  4.8e-06
      cubic                      0.148    0.026    0.32x        2.8  4.3e-06
      argument                   0.140    0.035    0.30x        3.1  4.3e-06
      by hand, implicit          4.803    0.125   10.32x       0.29    3e-08
      unrolled                  18.824    1.320   40.43x       0.52  1.2e-08

(A weight moves by up to 1e-3 per step, and V by a tenth in the first of them.)
"""

import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

if __package__:
    from benchmarks.gradients import optional, sweeps
    from benchmarks.solvers import TOL, run_on
else:
    from gradients import optional, sweeps
    from solvers import TOL, run_on

STEPS, RATE, BETA, FEATURES = 200, 1e-3, 5.0, 8
# Of a scan in PyTorch: one takes a second and more.
FEW = 3


def trained(step_of: Callable[..., Any], seen: jax.Array, start: Any) -> Callable[..., jax.Array]:
    """Return a program of 200 steps: weights `[F]` to weights.

    Args:
        step_of: `(weights, carry) -> (features of the policy [F], carry)`.
        seen: features to match.
        start: the first carry.
    """
    descent = optax.adam(RATE)

    def run(weights: jax.Array, *problem: Any) -> jax.Array:
        def step(state: Any, _: None) -> tuple[Any, None]:
            w, memory, carry = state
            collected, carry = step_of(w, carry, *problem)
            updates, memory = descent.update(collected - seen, memory)
            return (optax.apply_updates(w, updates), memory, carry), None

        return jax.lax.scan(step, (weights, descent.init(weights), start), None, length=STEPS)[0][0]

    return run


def by_solve(mdp: Any, table: jax.Array, tol: float | None, known: Any, count: int) -> tuple[Callable[..., Any], Any]:
    """Gradients through `rr.solve`, which begins at what the last `count` solutions lead to; and a carry to begin with.

    Args:
        mdp: None where it is an argument of the program.
        table: features `[S, F]`.
        tol: certified error.
        known: a solution, or a guess of a value alone.
        count: 0 begins at nothing.
    """
    import robustreg as rr

    def step(w: jax.Array, past: Any, *problem: Any) -> tuple[jax.Array, Any]:
        m = problem[0] if problem else mdp

        def objective(w: jax.Array) -> tuple[jax.Array, Any]:
            moved = m.replace(reward=jnp.broadcast_to((table @ w)[:, None], m.reward.shape))
            begin = past[0].extrapolated(*past[1:]) if past else None
            sol = rr.solve(moved, rr.kl(BETA), tol=tol, init=begin)
            return sol.objective, (sol.extrapolated(), *past[:-1]) if past else ()

        return jax.grad(objective, has_aux=True)(w)

    return step, (known.extrapolated(),) * count


def by_hand(mdp: Any, table: jax.Array) -> Callable[..., Any]:
    """Value iteration and occupancy iteration with the span stop, both from where the last step ended."""
    index, chance, g = mdp.transitions.indices, mdp.transitions.probabilities, mdp.discount
    stop = TOL * (1 - g) / g

    def backup(v: jax.Array, reward: jax.Array) -> tuple[jax.Array, jax.Array]:
        q = reward + g * jnp.sum(chance * v[index], axis=-1)
        return jax.nn.logsumexp(BETA * q, axis=-1, b=1 / q.shape[1]) / BETA, q

    def step(w: jax.Array, carry: Any) -> tuple[jax.Array, Any]:
        reward, (value, flow) = jnp.broadcast_to((table @ w)[:, None], mdp.reward.shape), carry

        def improve(state: Any) -> Any:
            new = backup(state[0], reward)[0]
            return new, jnp.ptp(new - state[0]) / 2

        value = jax.lax.while_loop(lambda s: s[1] > stop, improve, (value, jnp.asarray(jnp.inf, mdp.dtype)))[0]
        policy = jax.nn.softmax(BETA * backup(value, reward)[1], axis=-1)

        def push(state: Any) -> Any:
            moved = (g * state[0][:, None] * policy)[:, :, None] * chance
            new = mdp.initial + jnp.zeros_like(value).at[index].add(moved)
            return new, jnp.sum(jnp.abs(new - state[0]))

        flow = jax.lax.while_loop(lambda s: s[1] > TOL * BETA * (1 - g), push, (flow, jnp.asarray(jnp.inf, mdp.dtype)))[
            0
        ]
        return flow @ table, (value, flow)

    return step


def unrolled(mdp: Any, table: jax.Array, count: int) -> Callable[..., Any]:
    """Reverse mode through every sweep."""
    index, chance, g = mdp.transitions.indices, mdp.transitions.probabilities, mdp.discount

    def objective(w: jax.Array) -> jax.Array:
        reward = (table @ w)[:, None]

        def sweep(v: jax.Array, _: None) -> tuple[jax.Array, None]:
            q = reward + g * jnp.sum(chance * v[index], axis=-1)
            return jax.nn.logsumexp(BETA * q, axis=-1, b=1 / q.shape[1]) / BETA, None

        return mdp.initial @ jax.lax.scan(sweep, jnp.zeros(mdp.n_states, mdp.dtype), None, length=count)[0]

    return lambda w, carry: (jax.grad(objective)(w), carry)


def by_optimistix(library: Any, mdp: Any, table: jax.Array) -> Callable[..., Any]:
    """Its fixed-point iteration, from the last value, with its implicit adjoint."""
    index, chance, g = mdp.transitions.indices, mdp.transitions.probabilities, mdp.discount
    solver = library.FixedPointIteration(rtol=0, atol=TOL * (1 - g) / g)

    def backup(v: jax.Array, w: jax.Array) -> jax.Array:
        q = (table @ w)[:, None] + g * jnp.sum(chance * v[index], axis=-1)
        return jax.nn.logsumexp(BETA * q, axis=-1, b=1 / q.shape[1]) / BETA

    def step(w: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
        def objective(w: jax.Array) -> tuple[jax.Array, jax.Array]:
            v = library.fixed_point(backup, solver, value, args=w, max_steps=100_000, throw=False).value
            return mdp.initial @ v, v

        return jax.grad(objective, has_aux=True)(w)

    return step


def by_torch(torch: Any, mdp: Any, table: jax.Array, seen: jax.Array, count: int) -> Callable[[np.ndarray], Any]:
    """A few steps unrolled in PyTorch, as seconds per step."""
    given = (mdp.transitions.indices, mdp.transitions.probabilities, mdp.initial, table, seen)
    index, chance, initial, features, wanted = (torch.tensor(np.asarray(x)) for x in given)
    g, index = float(mdp.discount), index.long()

    def run(weights: np.ndarray) -> float:
        w = torch.tensor(weights, requires_grad=True)
        descent = torch.optim.Adam([w], lr=RATE)
        begin = time.perf_counter()
        for _ in range(FEW):
            descent.zero_grad()
            v = torch.zeros(len(initial), dtype=features.dtype)
            for _ in range(count):
                q = (features @ w)[:, None] + g * (chance * v[index]).sum(-1)
                v = (torch.logsumexp(BETA * q, -1) - np.log(q.shape[1])) / BETA
            (initial @ v - w @ wanted).backward()
            descent.step()
        return (time.perf_counter() - begin) / FEW

    return run


def problem_of(size: int, discount: float) -> tuple[Any, jax.Array]:
    """A slippery grid and the features of its cells, `[S, F]`."""
    import robustreg as rr

    mdp = rr.problems.slippery_grid(size, discount=discount, dtype=np.float64)
    kinds = np.random.default_rng(0).integers(FEATURES, size=mdp.n_states)
    return mdp, jnp.asarray(np.eye(FEATURES)[kinds])


def compare(size: int, discount: float, repeats: int) -> list[dict[str, Any]]:
    """Rows of one problem, one per method."""
    import robustreg as rr

    mdp, table = problem_of(size, discount)
    truth = -np.random.default_rng(1).uniform(size=FEATURES)
    moved = mdp.replace(reward=jnp.broadcast_to((table @ truth)[:, None], mdp.reward.shape))
    seen = jnp.sum(rr.occupancy(moved, rr.solve(moved, rr.kl(BETA)).policy), -1) @ table
    # (Not all of them by the same: rewards that differ by a constant have the same policy.)
    begun = truth + 0.1 * np.random.default_rng(2).normal(size=FEATURES)
    weights, zero = jnp.asarray(begun), jnp.zeros(mdp.n_states, mdp.dtype)
    count = sweeps(moved, jnp.asarray(BETA, mdp.dtype))
    first = rr.solve(mdp.replace(reward=jnp.zeros_like(mdp.reward)), rr.kl(BETA), tol=TOL, visits=True)
    value = dataclasses.replace(first, visits=None)
    steps: dict[str, tuple[Callable[..., Any], Any]] = {
        "cold": by_solve(mdp, table, TOL, value, 0),
        "last value": by_solve(mdp, table, TOL, value, 1),
        "last solution": by_solve(mdp, table, TOL, first, 1),
        "line": by_solve(mdp, table, TOL, first, 2),
        "parabola": by_solve(mdp, table, TOL, first, 3),
        "cubic": by_solve(mdp, table, TOL, first, 4),
        "argument": by_solve(None, table, TOL, first, 4),
        "by hand, implicit": (by_hand(mdp, table), (zero, zero)),
        "unrolled": (unrolled(mdp, table, count), zero),
    }
    if library := optional("optimistix"):
        steps["optimistix"] = (by_optimistix(library, mdp, table), zero)
    step, start = by_solve(mdp, table, None, first, 4)
    exact = np.asarray(jax.jit(trained(step, seen, start))(weights))
    runs, compiling, times, errors = {}, {}, {label: [] for label in steps}, {}
    for label, (step, start) in steps.items():
        given = (weights, mdp.prepared()) if label == "argument" else (weights,)
        begin = time.perf_counter()
        program = jax.jit(trained(step, seen, start)).lower(*given).compile()
        compiling[label] = time.perf_counter() - begin
        runs[label] = functools.partial(program, *given)
        errors[label] = float(np.abs(np.asarray(runs[label]()) - exact).max() / np.abs(exact).max())
    for _ in range(repeats):
        for label, run in runs.items():
            begin = time.perf_counter()
            jax.block_until_ready(run())
            times[label].append((time.perf_counter() - begin) / STEPS)
    if torch := optional("torch"):
        times["PyTorch"] = [by_torch(torch, mdp, table, seen, count)(np.asarray(weights))]
    base = np.median(times["cold"])
    about = {"states": mdp.n_states, "discount": discount, "sweeps": count}
    return [
        about
        | {
            "what": label,
            "median_ms": 1e3 * float(np.median(taken)),
            "spread_ms": 1e3 * float(np.ptp(taken)),
            "of_cold": float(np.median(taken) / base),
            "compile_s": compiling.get(label),
            "error": errors.get(label),
        }
        for label, taken in times.items()
    ]


def show(rows: list[dict[str, Any]]) -> None:
    """Print a table of one problem."""
    print(f"S={rows[0]['states']} discount {rows[0]['discount']}, {rows[0]['sweeps']} sweeps from zero")
    print(f"  {'':<20}{'ms per step':>12}{'spread':>9}{'of cold':>9}{'compile s':>11}{'error':>9}")
    for row in rows:
        compiling, error = ("" if row[k] is None else f"{row[k]:.2g}" for k in ("compile_s", "error"))
        print(
            f"  {row['what']:<20}{row['median_ms']:>12.3f}{row['spread_ms']:>9.3f}{row['of_cold']:>8.2f}x"
            f"{compiling:>11}{error:>9}",
            flush=True,
        )


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", type=int, default=16, help="cells of a side of the grid")
    parser.add_argument("--discount", type=float, default=0.99)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="a grid of 4 x 4 at a discount of .9, once")
    parser.add_argument("--json", help="append one JSON line per row to this file")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    about = run_on(dtype="float64")
    size, discount, repeats = (4, 0.9, 1) if options.small else (options.size, options.discount, options.repeats)
    rows = compare(size, discount, repeats)
    show(rows)
    if options.json:
        with open(options.json, "a") as file:
            file.writelines(json.dumps(about | row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
