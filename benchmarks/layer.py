"""How close do the one-step methods come to what a deep-learning library has built in?

    python benchmarks/layer.py [--shapes 4096x64,512x1024,8x128000] [--dtype float32|bfloat16] [--repeats 9]
                               [--json FILE]

Logits `[rows, A]`, normal with standard deviation 3, beta .5. Beside each method is what one would write instead:

* KL's `argmax` and `conjugate`: `jax.nn.softmax` and `jax.nn.logsumexp`; with a prior and a beta of each row, of
  `log_prior + beta * x`;
* KL's worst case of the logarithms of its policy: `jax.nn.log_softmax`;
* alpha 2 and 1.5: sparsemax and entmax by sorting [Martins and Astudillo 2016; Peters et al. 2019], whole rows, in JAX;
* alpha 1.7: 50 steps of bisection, as general entmax is computed;
* the same three by the library entmax in PyTorch, where both are installed (extra: pytorch), in columns of its own.

(`--shapes 1024x32000` takes minutes, most of them to sort.)

`forward` is one call, `both` a call and its vector-Jacobian product, in milliseconds: medians of warm, interleaved
calls. The factors are times of the baseline: below 1 is faster than it. `memory` is the scratch space and the results
of `both`, in units of the logits. `error` is the largest deviation from the baseline's forward result.

Typical printout (2 shared CPU cores, quiet, 25 repeats; entmax 1.3 in PyTorch):

    commit d47b09c, device cpu, machine x86_64, jax 0.12.0.1
    [4096, 64], float32
                              forward  factor     both  factor  memory    error   PyTorch   both
      kl argmax                  0.61    0.96     1.38    0.97     2.0    2e-07
      kl argmax, prior           0.79    1.15     1.47    1.00     2.0    1e-07
      kl conjugate               0.56    1.13     0.51    0.93     2.1    1e-06
      kl conjugate, prior        0.53    0.88     0.77    1.27     4.1    1e-06
      kl worst case              0.67    0.95     1.06    1.09     4.0    0e+00
      alpha 1.5 argmax           2.32    0.10     3.38    0.13     5.3    2e-07      0.22   0.30
      alpha 2 argmax             1.95    0.09     3.07    0.13     5.3    2e-08      0.26   0.32
      alpha 1.7 argmax           3.39    0.19     4.59    0.21     5.3    6e-08      0.04   0.05
    [512, 1024], float32
                              forward  factor     both  factor  memory    error   PyTorch   both
      kl argmax                  0.67    1.09     1.52    1.01     3.0    2e-08
      kl argmax, prior           0.66    1.03     1.27    1.08     3.0    6e-08
      kl conjugate               0.62    0.81     0.70    0.89     2.0    1e-06
      kl conjugate, prior        0.75    1.04     1.02    1.18     4.0    1e-06
      kl worst case              0.68    0.83     1.39    0.93     2.0    0e+00
      alpha 1.5 argmax           2.35    0.04     4.20    0.06     4.0    2e-08      0.07   0.14
      alpha 2 argmax             2.27    0.04     3.78    0.07     4.0    2e-09      0.11   0.15
      alpha 1.7 argmax           5.00    0.14     6.61    0.17     4.0    6e-09      0.03   0.04
    [8, 128000], float32
                              forward  factor     both  factor  memory    error   PyTorch   both
      kl argmax                  1.29    0.81     3.24    1.18     3.0    7e-10
      kl argmax, prior           2.31    1.22     3.93    0.96     3.0    3e-09
      kl conjugate               1.31    1.17     1.25    0.77     2.0    1e-06
      kl conjugate, prior        2.06    1.07     2.10    1.07     4.0    1e-06
      kl worst case              1.97    0.89     3.11    0.86     2.0    0e+00
      alpha 1.5 argmax           4.15    0.02     8.59    0.04     4.0    2e-10      0.05   0.11
      alpha 2 argmax             4.37    0.02     7.49    0.04     4.0    3e-11      0.08   0.12
      alpha 1.7 argmax           9.16    0.13    12.53    0.17     4.0    8e-11      0.03   0.04

In bfloat16 (whose errors are units of what is rounded, and whose memory is twice that in units of the logits), the
same day, factors of `both`: KL .71 to 1.56, alpha 1.5 and 2 .04 to .17 (of PyTorch .17 to .46), alpha 1.7 .08 or .09
(.04 or .05).
"""

import argparse
import json
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

BETA = 0.5
SHAPES = "4096x64,512x1024,8x128000"


def with_gradient(policy: Callable[[Any], Any], weight: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A policy whose derivative is `w (g - <w, g>/W)`, as entmax has it."""
    wrapped = jax.custom_vjp(policy)

    def backward(p: Any, g: Any) -> tuple[Any]:
        w = weight(p)
        return (w * (g - jnp.sum(w * g, -1, keepdims=True) / jnp.sum(w, -1, keepdims=True)),)

    wrapped.defvjp(lambda x: (policy(x),) * 2, backward)
    return wrapped


def sparsemax(x: Any) -> Any:
    """Projection onto the simplex by sorting."""
    ordered = -jnp.sort(-x, axis=-1)
    count = jnp.arange(1, x.shape[-1] + 1, dtype=x.dtype)
    excess = jnp.cumsum(ordered, axis=-1) - 1
    size = jnp.sum(count * ordered > excess, axis=-1, keepdims=True, dtype=jnp.int32)
    return jnp.maximum(x - jnp.take_along_axis(excess, size - 1, -1) / size.astype(x.dtype), 0)


def entmax15(x: Any) -> Any:
    """Entmax of order 1.5 by sorting."""
    x = (x - jnp.max(x, axis=-1, keepdims=True)) / 2
    ordered = -jnp.sort(-x, axis=-1)
    count = jnp.arange(1, x.shape[-1] + 1, dtype=x.dtype)
    mean, square = jnp.cumsum(ordered, axis=-1) / count, jnp.cumsum(ordered**2, axis=-1) / count
    tau = mean - jnp.sqrt(jnp.maximum((1 - count * (square - mean**2)) / count, 0))
    size = jnp.sum(tau <= ordered, axis=-1, keepdims=True, dtype=jnp.int32)
    return jnp.maximum(x - jnp.take_along_axis(tau, size - 1, -1), 0) ** 2


def bisected(alpha: float, steps: int = 50) -> Callable[[Any], Any]:
    """Entmax of any order by bisection."""

    def power(y: Any, k: float) -> Any:
        return jnp.where(y > 0, jnp.exp(k * jnp.log(jnp.where(y > 0, y, 1))), 0)

    def policy(x: Any) -> Any:
        x = (alpha - 1) * x
        top = jnp.max(x, axis=-1, keepdims=True)

        def halve(_: int, state: Any) -> Any:
            low, width = state
            middle = low + width / 2
            enough = jnp.sum(power(x - middle, 1 / (alpha - 1)), axis=-1, keepdims=True) >= 1
            return jnp.where(enough, middle, low), width / 2

        width = jnp.full_like(top, 1 - x.shape[-1] ** (1 - alpha))
        p = power(x - jax.lax.fori_loop(0, steps, halve, (top - 1, width))[0], 1 / (alpha - 1))
        return p / jnp.sum(p, axis=-1, keepdims=True)

    return with_gradient(policy, lambda p: power(p, 2 - alpha))


def entmax(alpha: float) -> Callable[[Any], Any]:
    """The baseline of an order, on `beta x` against the uniform prior."""
    forms = {
        1.5: with_gradient(entmax15, jnp.sqrt),
        2.0: with_gradient(sparsemax, lambda p: (p > 0).astype(p.dtype)),
    }
    form = forms.get(alpha) or bisected(alpha)
    return lambda x: form(x.shape[-1] ** (1 - alpha) * BETA * x)


def by_entmax(alpha: float, x: Any, g: Any) -> list[Callable[[], Any]]:
    """The library entmax on the same logits, forward and with its gradient, on a CPU; nothing where it is missing."""
    torch, library = optional("torch"), optional("entmax")
    if torch is None or library is None or jax.default_backend() != "cpu":
        return []
    forms = {1.5: library.entmax15, 2.0: library.sparsemax}
    form = forms.get(alpha) or (lambda x: library.entmax_bisect(x, alpha))
    kind = getattr(torch, x.dtype.name)
    logits, cotangent = (torch.from_numpy(np.array(v, np.float32)).to(kind) for v in (x, g))
    scale = x.shape[-1] ** (1 - alpha) * BETA

    def forward() -> Any:
        with torch.no_grad():
            return form(scale * logits)

    def whole() -> Any:
        leaf = logits.detach().requires_grad_()
        policy = form(scale * leaf)
        return torch.autograd.grad(policy, leaf, cotangent)

    return [forward, whole]


def pairs(rows: int, actions: int, dtype: Any) -> dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]]:
    """What is compared: the library's function of the logits and the baseline, by name."""
    import robustreg as rr

    logits = jax.random.normal(jax.random.key(1), (rows, actions), jnp.float32)
    log_prior, beta = jax.nn.log_softmax(logits), jnp.full(rows, BETA, jnp.float32)
    kl = rr.kl(np.float32(BETA))
    own = rr.kl(np.float32(1), log_prior=log_prior, state_scale=beta)
    shifted = lambda x: log_prior + beta[:, None] * x.astype(jnp.float32)  # noqa: E731
    found = {
        "kl argmax": (kl.argmax, lambda x: jax.nn.softmax(BETA * x)),
        "kl argmax, prior": (own.argmax, lambda x: jax.nn.softmax(shifted(x)).astype(x.dtype)),
        "kl conjugate": (kl.conjugate, lambda x: (jax.nn.logsumexp(BETA * x, -1) - np.log(actions)) / BETA),
        "kl conjugate, prior": (own.conjugate, lambda x: (jax.nn.logsumexp(shifted(x), -1) / beta).astype(x.dtype)),
        "kl worst case": (
            lambda x: rr.worst_case(kl, log_policy=jax.nn.log_softmax(BETA * x)),
            lambda x: (jax.nn.log_softmax(BETA * x) + np.log(actions)) / BETA,
        ),
    }
    for alpha in (1.5, 2.0, 1.7):
        reg = rr.alpha(np.float32(alpha), np.float32(BETA))
        found[f"alpha {alpha:g} argmax"] = (reg.argmax, entmax(alpha))
    return found


def both(function: Callable[[Any], Any]) -> Callable[[Any, Any], Any]:
    """A function with its vector-Jacobian product."""

    def run(x: Any, g: Any) -> Any:
        y, pull = jax.vjp(function, x)
        return y, pull(g.astype(y.dtype))[0]

    return run


def compare(shape: tuple[int, int], dtype: Any, repeats: int) -> list[dict[str, Any]]:
    """Rows of one shape: one per method."""
    x = (3 * jax.random.normal(jax.random.key(0), shape, jnp.float32)).astype(dtype)
    rows = []
    for name, pair in pairs(*shape, dtype).items():
        results = [jax.eval_shape(function, x) for function in pair]
        g = jax.random.normal(jax.random.key(2), results[0].shape, jnp.float32).astype(dtype)
        forward = [jax.jit(function).lower(x).compile() for function in pair]
        whole = [jax.jit(both(function)).lower(x, g).compile() for function in pair]
        answers = [np.asarray(program(x), np.float64) for program in forward]
        calls: list[Callable[[], Any]] = [lambda program=program: program(x) for program in forward]
        calls += [lambda program=program, g=g: program(x, g) for program in whole]
        others = by_entmax(float(name.split()[1]), x, g) if name.startswith("alpha") else []
        answers += [call().double().numpy() for call in others[:1]]
        times: list[list[float]] = [[] for _ in (*calls, *others)]
        order = list(zip(times, (*calls, *others)))
        for _ in range(repeats + 1):
            for taken, call in order:
                taken.append(timed(call))
            # Who comes after a method finds in the caches what it has left there.
            order.reverse()
        median = [1e3 * float(np.median(t[1:])) for t in times]
        memory: Any = whole[0].memory_analysis()
        rows.append(
            {
                "shape": list(shape),
                "dtype": str(jnp.dtype(dtype)),
                "what": name,
                "forward_ms": median[0],
                "forward_of_baseline": median[0] / median[1],
                "both_ms": median[2],
                "both_of_baseline": median[2] / median[3],
                "memory": (memory.temp_size_in_bytes + memory.output_size_in_bytes) / x.nbytes,
                **{
                    f"{key}_of_entmax": m / t
                    for key, m, t in zip(("forward", "both"), (median[0], median[2]), median[4:])
                },
                "error": max(float(np.abs(answers[0] - other).max()) for other in answers[1:]),
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """A table of one shape."""
    print(f"{rows[0]['shape']}, {rows[0]['dtype']}")
    heads = f"  {'':<22}{'forward':>9}{'factor':>8}{'both':>9}{'factor':>8}{'memory':>8}{'error':>9}"
    compared = any("both_of_entmax" in row for row in rows)
    print(heads + (f"{'PyTorch':>10}{'both':>7}" if compared else ""))
    for row in rows:
        beside = "".join(
            f"{row[key]:>{n}.2f}" for key, n in (("forward_of_entmax", 10), ("both_of_entmax", 7)) if key in row
        )
        print(
            f"  {row['what']:<22}{row['forward_ms']:>9.2f}{row['forward_of_baseline']:>8.2f}{row['both_ms']:>9.2f}"
            f"{row['both_of_baseline']:>8.2f}{row['memory']:>8.1f}{row['error']:>9.0e}{beside}"
        )


def main() -> None:
    """Run every shape, print the tables, and write JSON lines if asked to."""
    parser = argparse.ArgumentParser(description="cost of the one-step methods beside softmax and entmax")
    parser.add_argument("--shapes", default=SHAPES, help="rows x actions, comma-separated")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", help="append JSON lines to this file")
    arguments = parser.parse_args()
    about = run_on()
    for text in arguments.shapes.split(","):
        rows, actions = map(int, text.split("x"))
        found = compare((rows, actions), jnp.dtype(arguments.dtype), arguments.repeats)
        show(found)
        if arguments.json:
            with open(arguments.json, "a") as file:
                file.writelines(json.dumps(about | row) + "\n" for row in found)


if __name__ == "__main__":
    main()
