r"""A contextual bandit whose policy is a network, trained against the adversary inside one jitted step.

**The problem.** In a context x (a vector) an agent picks one of A actions; the reward `r(x, a)` may be tampered with by
an adversary once the policy is known, within the robust set of a KL regulariser towards a base policy, itself a small
network. The agent's policy is a network too. It starts from uniform.

**The identity.** Against a policy p the worst case is known: `dr = log(p/p0)/beta` [`rr.worst_case`]. So one step of
training is a round of the game: sample contexts, let the adversary answer the policy as it is, hold its answer fixed
(`stop_gradient`), and follow the gradient of `E_p[r - dr]`. By Danskin's theorem that is the gradient of the guaranteed
reward `E_p[r] - KL(p : p0)/beta`, adversary and all: no inner loop, no second network. What the best policy is
guaranteed, `log(sum p0 exp(beta r))/beta`, is the layer's `conjugate`.

The rival is trained in the same way without an adversary.

**What is claimed.** On contexts not seen in training: (1) the gradient of a round is that of the guaranteed reward, to
rounding; (2) the trained network is guaranteed the best there is but for 2% of what there is to gain over the base
policy; (3) under attack it keeps more than the rival, which earns more while nobody attacks.
"""

from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax

import robustreg as rr
from robustreg.examples.report import Claim, Report
from robustreg.figures import style

HARD = 1e6  # the beta of an adversary who can do next to nothing


def network(key: jax.Array, sizes: tuple[int, ...], last: float) -> list[Any]:
    """Draw the weights of a network; `last` scales those of its outputs."""
    keys, pairs = jax.random.split(key, len(sizes) - 1), list(zip(sizes, sizes[1:]))
    scales = [1.0] * (len(pairs) - 1) + [last]
    return [(s * jax.random.normal(k, n) * n[0] ** -0.5, jnp.zeros(n[1])) for k, n, s in zip(keys, pairs, scales)]


def outputs(weights: list[Any], x: jax.Array) -> jax.Array:
    """Evaluate a network on contexts `[N, D]`."""
    for matrix, bias in weights[:-1]:
        x = jnp.tanh(x @ matrix + bias)
    return x @ weights[-1][0] + weights[-1][1]


def played(weights: Any, base: Any, x: jax.Array, reward: jax.Array, beta: float) -> jax.Array:
    """One round: the mean reward that is left by an adversary who has answered, and whose answer is held fixed."""
    log_p = jax.nn.log_softmax(outputs(weights, x))
    reg = rr.kl(beta=beta, log_prior=jax.nn.log_softmax(outputs(base, x)))
    answer = jax.lax.stop_gradient(rr.worst_case(reg, log_policy=log_p))
    return jnp.mean(jnp.sum(jnp.exp(log_p) * (reward - answer), -1))


def secured(weights: Any, base: Any, x: jax.Array, reward: jax.Array, beta: float) -> jax.Array:
    """Compute the guaranteed reward from its formula, with the divergence written out."""
    log_p, log_p0 = jax.nn.log_softmax(outputs(weights, x)), jax.nn.log_softmax(outputs(base, x))
    return jnp.mean(jnp.sum(jnp.exp(log_p) * (reward - (log_p - log_p0) / beta), -1))


def train(key: jax.Array, weights: Any, base: Any, pays: Any, beta: float, options: dict[str, Any]) -> Any:
    """Play rounds with fresh contexts; return the weights and what each round left."""
    descent = optax.adam(optax.cosine_decay_schedule(options["rate"], options["steps"], alpha=0.01))
    width = weights[0][0].shape[0]

    def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        x = jax.random.normal(key, (options["batch"], width))
        left, slope = jax.value_and_grad(played)(carry[0], base, x, outputs(pays, x), beta)
        updates, state = descent.update(jax.tree.map(jnp.negative, slope), carry[1])
        return (optax.apply_updates(carry[0], updates), state), left

    keys = jax.random.split(key, options["steps"])
    (weights, _), left = jax.jit(lambda c: jax.lax.scan(step, c, keys))((weights, descent.init(weights)))
    return weights, left


def run(
    seed: int = 0,
    width: int = 4,
    actions: int = 8,
    hidden: int = 64,
    beta: float = 1.0,
    steps: int = 3000,
    batch: int = 256,
    rate: float = 0.01,
    contexts: int = 2000,
) -> Report:
    """Run the pipeline.

    Args:
        seed: of everything random.
        width, actions: D and A.
        hidden: width of the policy's two hidden layers.
        beta: inverse strength of the adversary.
        steps, batch, rate: rounds, contexts in a round, and rate of Adam.
        contexts: to judge by.
    """
    k = jax.random.split(jax.random.key(seed), 6)
    pays, base = network(k[0], (width, 16, actions), 2.0), network(k[1], (width, 16, actions), 1.5)
    first = network(k[2], (width, hidden, hidden, actions), 0.0)
    options = {"steps": steps, "batch": batch, "rate": rate}
    trained, left = train(k[3], first, base, pays, beta, options)
    rival, _ = train(k[3], first, base, pays, HARD, options)
    x = jax.random.normal(k[4], (contexts, width))
    reward, log_p0 = outputs(pays, x), jax.nn.log_softmax(outputs(base, x))
    # (Half-trained: at the optimum both gradients are next to 0.)
    half = jax.tree.map(lambda w: 0.5 * w, trained)
    slopes = [jax.flatten_util.ravel_pytree(jax.grad(f)(half, base, x, reward, beta))[0] for f in (played, secured)]
    policies = {"base": log_p0, "trained for peace": jax.nn.log_softmax(outputs(rival, x))}
    policies["trained in the game"] = jax.nn.log_softmax(outputs(trained, x))
    numbers = {
        "policy": np.array(list(policies)),
        **judged(np.stack(list(policies.values())), np.asarray(reward), np.asarray(log_p0), beta),
        "best": np.asarray(rr.kl(beta=beta, log_prior=log_p0).conjugate(reward)),
        "round": np.asarray(left),
        "slopes": np.stack(slopes),
    }
    return Report(_rows(numbers), numbers, claims(numbers), lambda: draw(numbers))


def judged(log_p: np.ndarray, reward: np.ndarray, log_p0: np.ndarray, beta: float) -> dict[str, np.ndarray]:
    """Compute the reward of policies `[P, N, A]` by context, in peace and under attack, `[P, N]` each, by NumPy."""
    peace = (np.exp(log_p) * reward).sum(-1)
    return {"peace": peace, "attacked": peace - (np.exp(log_p) * (log_p - log_p0)).sum(-1) / beta}


def _rows(numbers: dict[str, Any]) -> list[dict[str, str]]:
    """Rows of the table: means over contexts."""
    columns = zip(numbers["policy"], numbers["peace"].mean(1), numbers["attacked"].mean(1))
    rows = [{"policy": name, "in peace": f"{peace:.3f}", "attacked": f"{war:.3f}"} for name, peace, war in columns]
    return [*rows, {"policy": "best against attacks", "in peace": "", "attacked": f"{numbers['best'].mean():.3f}"}]


def claims(numbers: dict[str, Any]) -> list[Claim]:
    """Check what the docstring of this module claims."""
    base, rival, trained = numbers["attacked"].mean(1)
    best, peace = numbers["best"].mean(), numbers["peace"].mean(1)
    missed = (best - trained) / (best - base)
    off = float(np.abs(np.subtract(*numbers["slopes"])).max() / np.abs(numbers["slopes"]).max())
    held = trained > rival and peace[1] > peace[2]
    sentence = f"attacked, it keeps {trained:.2f}, the rival {rival:.2f}; "
    sentence += f"in peace they earn {peace[2]:.2f} and {peace[1]:.2f}"
    return [
        Claim(f"the gradient of a round is that of the guaranteed reward, to {off:.0e} (1e-9)", off <= 1e-9),
        Claim(f"the network misses {missed:.2%} of what there is to gain (at most 2%)", missed <= 0.02),
        Claim(sentence, bool(held)),
    ]


def draw(numbers: dict[str, Any]) -> Any:
    """Draw the training, and what policies keep."""
    figure = style.new_figure(10.5, 4.3)
    training, kept = figure.subplots(1, 2)
    rounds, left = 1 + np.arange(len(numbers["round"])), numbers["round"]
    training.semilogx(rounds, left, color=BLUE, linewidth=0.8, label="left by the adversary")
    training.axhline(numbers["best"].mean(), color=style.INK, linestyle="--", label="best guarantee")
    training.set(xlabel="round of the game", ylabel="reward (reward units)", title="Training")
    training.legend(frameon=False, loc="lower right")
    places = np.arange(len(numbers["policy"]))
    kept.bar(places - 0.19, numbers["peace"].mean(1), 0.36, color="#9a9a9a", label="in peace")
    kept.bar(places + 0.19, numbers["attacked"].mean(1), 0.36, color=VERMILION, label="under the worst attack")
    kept.axhline(0, color=style.INK, linewidth=0.8)
    kept.set_xticks(places, [str(name).replace("trained ", "trained\n") for name in numbers["policy"]])
    kept.set(ylabel="mean reward (reward units)", title="Contexts not seen in training")
    kept.legend(frameon=False)
    return figure


BLUE, VERMILION = "#0072b2", "#d55e00"
