"""The CUDA kernel's answers, emulated on a CPU, are the loop's.

Values differ from the loop's by rounding: what is asserted of both is that every certified interval holds the value
that is known in float64, and that lanes end with the same status.
"""

import contextlib
import dataclasses
import os
import shutil
import types
from typing import Any

import cases
import emulated
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import robustreg as rr
from robustreg.solvers import bound_problem, resident_kernel
from robustreg.solvers.loop import iterate
from robustreg.solvers.tolerance import Tolerance

DTYPE = np.float32

# What takes minutes where the kernel is emulated, and says little that the others do not. A card runs everything.
WHOLE = pytest.mark.skipif(
    os.environ.get("ROBUSTREG_TEST_KERNEL") != "all" and jax.default_backend() != "gpu",
    reason="minutes of emulation: set ROBUSTREG_TEST_KERNEL=all",
)
# Where solves are carried out: JAX compiles anew for every value of it.
PLACE = jax.make_user_context("")


@pytest.fixture(scope="module")
def carrier(tmp_path_factory):
    """Kernels on this process's GPU, else on the CPU."""
    if jax.default_backend() == "gpu":
        return resident_kernel.cuda()
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed: the kernel cannot be emulated")
    return emulated.Emulated(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def solving_with(monkeypatch):
    """A context in which solves are the loop's (None) or a carrier's.

    Programs of one are kept apart from those of the other, and neither has to be compiled again.
    """

    @contextlib.contextmanager
    def within(place):
        with monkeypatch.context() as patch, PLACE("" if place is None else type(place).__name__):
            patch.setattr(resident_kernel, "carrier", lambda: place)
            yield

    return within


@pytest.fixture
def twice(carrier, solving_with):
    """Call a function with the loop, then with the kernel."""

    def call(function):
        found = []
        for place in (None, carrier):
            with solving_with(place):
                found.append(jax.block_until_ready(function()))
        return found

    return call


def single(values):
    """Numbers of lanes in float32."""
    return jnp.asarray(np.asarray(values, DTYPE))


def double(reg):
    """A regulariser with the same numbers in float64."""
    return jax.tree.map(lambda x: x.astype(np.float64), reg)


def reference(m, beta, alpha=1.0):
    """The oracle's value of an MDP in float64 without masks, as bounds that no solve needs to be compiled for."""
    rows, shape = m.transitions, (m.n_states, m.n_actions)
    if isinstance(rows, rr.Dense):
        P = np.asarray(rows.probabilities)
    else:
        P, (s, a) = np.zeros((*shape, m.n_states)), np.ogrid[: m.n_states, : m.n_actions]
        for k in range(rows.indices.shape[-1]):
            np.add.at(P, (s, a, np.asarray(rows.indices)[..., k]), np.asarray(rows.probabilities)[..., k])
    prior = np.full(shape, 1 / m.n_actions)
    discount, beta = np.broadcast_arrays(np.asarray(m.discount), np.asarray(beta, float))
    value, _ = oracle.solve(P, np.asarray(m.reward), discount, alpha, beta, prior)
    return types.SimpleNamespace(lower=value, upper=value, value=value)


def assert_holds(sol, exact):
    """The certified interval of every lane that has one meets the one found in float64, or holds the value."""
    known = np.asarray(sol.status) < rr.Status.NONFINITE_INPUT
    lower, upper = (np.asarray(x, float)[known] for x in (sol.lower, sol.upper))
    assert (lower <= np.asarray(exact.upper)[known]).all()
    assert (upper >= np.asarray(exact.lower)[known]).all()


def assert_alike(loop, kernel, exact, tol=0.0):
    """Solutions by the loop and by the kernel, and in float64."""
    for sol in (loop, kernel):
        assert_holds(sol, exact)
    np.testing.assert_array_equal(loop.status, kernel.status)
    assert kernel.value.dtype == DTYPE
    # Rounding bounds are the same, and so is where a solve stops.
    assert (np.asarray(kernel.gap) <= np.maximum(2.01 * tol, 4 * np.asarray(loop.gap))).all()


REGS = {
    "KL": lambda beta: rr.kl(beta),
    "alpha .5": lambda beta: rr.alpha(single(0.5), beta),
    "alpha 1.5": lambda beta: rr.alpha(single(1.5), beta),
    "alpha 2": lambda beta: rr.alpha(single(2), beta),
}
ORDERS = {"KL": 1.0, "alpha .5": 0.5, "alpha 1.5": 1.5, "alpha 2": 2.0}
# Of both extremes, and where a policy is neither the prior nor nearly deterministic.
BETAS = (1e-3, 0.3, 10.0, 1e4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("dense", "KL"),
        pytest.param("dense", "alpha 1.5", marks=WHOLE),
        ("successors", "alpha .5"),
        pytest.param("successors", "alpha 2", marks=WHOLE),
    ],
)
def test_every_case(twice, kind, name):
    """Nine problems, with termination, masks, ties, slow mixing, bandits; betas and discounts from end to end."""
    stack = cases.stack(cases.all_cases())
    discounts = np.array([0.0, 0.9, 0.99, 0.9999])
    beta, discount = (x.ravel() for x in np.meshgrid(BETAS, discounts))
    reg = REGS[name](single(beta))
    reg = with_prior(reg, np.log(np.where(stack.prior > 0, stack.prior, 1)) + np.where(stack.prior > 0, 0, -np.inf))
    m = stack_of(stack, kind, discount, DTYPE)
    loop, kernel = twice(lambda: rr.solve(m, reg))
    index = {"alpha": np.full(16, ORDERS[name]), "beta": np.asarray(reg.beta, float), "discount": discount}
    value, _ = cases.truth(stack, index)
    assert_alike(loop, kernel, types.SimpleNamespace(lower=value, upper=value))
    assert kernel.status.shape == (9, 16)


def with_prior(reg, log_prior):
    """The same regulariser with a prior `[9, S, A]` of stacked cases, for lanes `[9, L]`."""
    log_prior = jnp.asarray(log_prior[:, None].astype(DTYPE))
    order = {"alpha": reg.alpha} if hasattr(reg, "alpha") else {}
    return type(reg)(**order, beta=reg.beta, log_prior=log_prior)


def stack_of(stack, kind, discount, dtype):
    """Stacked cases as an MDP with lanes `[9, L]`."""
    names = ("P", "reward", "termination", "initial", "prior")
    return cases.Case("", *(getattr(stack, n)[:, None] for n in names)).mdp(discount, kind, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "name"),
    [
        (4, "alpha .5"),
        pytest.param(4, "alpha 1.5", marks=WHOLE),
        (16, "KL"),
        pytest.param(16, "alpha 2", marks=WHOLE),
    ],
)
def test_grids(twice, size, name):
    """Neighbour lists that actions share, in registers; several states per thread; no episode ends."""
    discount = np.array([0.0, 0.9, 0.99, 0.999])[:, None]
    reg = REGS[name](single(np.geomspace(0.1, 300, 4)))
    m = rr.problems.slippery_grid(size, discount, dtype=DTYPE)
    loop, kernel = twice(lambda: rr.solve(m, reg, tol=1e-2))
    same = rr.problems.slippery_grid(size, discount)
    # (The oracle is slow where there are many states.)
    exact = reference(same, reg.beta, ORDERS[name]) if size == 4 else rr.solve(same, double(reg))
    assert_alike(loop, kernel, exact, 1e-2)
    assert (np.asarray(kernel.status[:3]) == 0).all()


def dense_garnet(n_states, n_actions, dtype):
    """A random MDP with dense rows."""
    many = rr.problems.garnets(1, n_states, n_actions, 5, 0.99, dtype=dtype)
    return jax.tree.map(lambda x: x[0] if x.ndim and x.shape[0] == 1 else x, many)


@pytest.mark.parametrize("name", ("KL", "alpha 1.5"))
def test_the_certificate_is_the_librarys(twice, name):
    """Width and rounding of one backup at any value: two texts, one formula."""
    stack = cases.stack(cases.all_cases())
    beta, discount = (x.ravel() for x in np.meshgrid(BETAS, [0.0, 0.9, 0.9999]))
    m: Any = stack_of(stack, "dense", discount, DTYPE)
    # A reward that nobody takes, and rows that miss 1: both count in the rounding.
    wild = np.where(np.arange(cases.ACTIONS) == 1, -1e4, np.asarray(m.reward)).astype(DTYPE)
    rows = rr.Dense(m.transitions.probabilities * DTYPE(1.0005))
    m = dataclasses.replace(m, reward=jnp.asarray(wild), transitions=rows)
    reg = with_prior(REGS[name](single(beta)), np.log(np.maximum(stack.prior, 1e-3)))
    start = np.random.default_rng(0).normal(size=(cases.STATES, 9, beta.size)).astype(DTYPE)

    def once():
        def run(m, reg, start):
            problem = bound_problem.bind(m, reg)
            tol, limit = Tolerance.read(None, DTYPE).broadcast(problem.batch), jnp.asarray(1, jnp.int32)
            loop = iterate(dataclasses.replace(problem, valid=problem.valid | True), rr.Newton(), tol, limit, start)
            return loop.noise, loop.half_width

        return jax.jit(run)(m, reg, start)

    for loop, kernel in zip(*twice(once)):
        np.testing.assert_allclose(kernel, loop, rtol=2e-5)


PROBLEMS = {
    "one state": lambda dtype: rr.problems.bandit(discount=0.9, dtype=dtype),
    "as many states as actions": lambda dtype: rr.problems.garnet(5, 5, 2, 0.9, dtype=dtype),
    "two actions": lambda dtype: rr.problems.chain(6, 0.99, dtype=dtype),
    "deterministic ring": lambda dtype: rr.problems.ring(70, 0.99, slip=0.0, dtype=dtype),
    "long dense rows": lambda dtype: dense_garnet(70, 3, dtype),
    "dense rows of another size": lambda dtype: dense_garnet(33, 5, dtype),
    "one action": lambda dtype: rr.problems.garnet(33, 1, 3, 0.99, dtype=dtype),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_shapes(twice, problem):
    """Sizes at the edges."""
    m, reg = PROBLEMS[problem](DTYPE), rr.kl(single(BETAS))
    loop, kernel = twice(lambda: rr.solve(m, reg))
    assert_alike(loop, kernel, reference(PROBLEMS[problem](np.float64), reg.beta))


def test_extreme_strengths_and_long_lists(twice):
    """From policies that are the prior to rounding to policies that are deterministic to rounding."""
    reg = rr.kl(single([1e-20, 1e-12, 1e-8, 1e-6, 1e-4, *BETAS, 1e6, 1e10, 1e20]))
    discount = np.array([0.0, 0.99, 0.9999])[:, None]
    m = rr.problems.garnet(40, 8, 8, discount, dtype=DTYPE)
    loop, kernel = twice(lambda: rr.solve(m, reg))
    assert_alike(loop, kernel, reference(rr.problems.garnet(40, 8, 8, discount), reg.beta))
    assert (np.asarray(kernel.status) == 0).all()


def test_own_tables(twice):
    """Rewards, rows, priors, strengths and discounts of different lanes, in different axes."""
    rng = np.random.default_rng(0)
    prior = rng.dirichlet(np.ones(4), (3, 1, 256)).astype(DTYPE)
    scale = (0.5 + rng.random((2, 256))).astype(DTYPE)
    bonus = rng.random((2, 1, 1)).astype(DTYPE)

    def problem(dtype):
        grid: Any = rr.problems.slippery_grid(16, dtype=dtype)
        p = np.asarray(grid.transitions.probabilities)
        p = np.stack([p, p[..., ::-1], p])[:, None]
        reward = np.asarray(grid.reward) + bonus.astype(dtype)
        return rr.mdp(rr.Successors(grid.transitions.indices, jnp.asarray(p)), reward, np.array([0.9, 0.99]))

    reg = rr.kl(single([3.0, 30.0]), log_prior=np.log(prior), state_scale=scale)
    m = problem(DTYPE)
    loop, kernel = twice(lambda: rr.solve(m, reg, tol=1e-3))
    assert loop.status.shape == kernel.status.shape == (3, 2)
    assert_alike(loop, kernel, rr.solve(problem(np.float64), double(reg)), 1e-3)


def test_lanes_are_alone(carrier, solving_with):
    """A lane has the same bits alone, beside others, and beside NaN, which ends with its own status."""
    grid = rr.problems.slippery_grid(4, dtype=DTYPE)
    reward = np.stack([grid.reward] * 3)
    reward[1, 5, 2] = np.nan
    m = rr.mdp(grid.transitions, np.stack([grid.reward] * 3)[:, None], np.array([0.9, 0.999]))
    m = dataclasses.replace(m, reward=jnp.asarray(reward[:, None]))
    one = rr.mdp(grid.transitions, grid.reward, 0.999)
    with solving_with(carrier):
        sol, alone = (rr.solve(x, rr.kl(single(3.0)), tol=1e-3) for x in (m, one))
    np.testing.assert_array_equal(sol.status, [[0, 0], [rr.Status.NONFINITE_INPUT] * 2, [0, 0]])
    assert np.isnan(sol.value[1]).all() and np.isfinite(sol.value[::2]).all()
    for lane in (sol.value[0, 1], sol.value[2, 1]):
        np.testing.assert_array_equal(lane, alone.value)


def test_limits_and_tolerances(twice):
    """Caps on steps, tolerances below rounding and none at all; the value is the one that its width belongs to."""
    m = rr.problems.slippery_grid(4, 0.999, dtype=DTYPE)
    reg = rr.kl(single(30.0))
    exact = reference(rr.problems.slippery_grid(4, 0.999), reg.beta)
    asked = ((1, 1e-6), (2, 1e-3), (3, None), (5, 1e-3), (30, 1e-9), (None, 1e-9), (None, None))
    for (steps, _), loop, kernel in zip(
        asked, *twice(lambda: [rr.solve(m, reg, tol=t, max_steps=n) for n, t in asked])
    ):
        assert_holds(kernel, exact)
        assert steps is None or kernel.steps <= steps
        # Plain sweeps are steps, so that a cap of a few comes earlier.
        assert kernel.status == loop.status or steps not in (1, None)
        assert kernel.status in (rr.Status.CONVERGED, rr.Status.STAGNATED, rr.Status.MAX_STEPS)


def test_init(twice):
    """A start is used; NaN in it is the input's fault."""
    m, reg = rr.problems.slippery_grid(4, 0.99, dtype=DTYPE), rr.kl(single([1.0, 10.0]))
    exact = reference(rr.problems.slippery_grid(4, 0.99), reg.beta)
    start = np.array(exact.value, DTYPE)
    loop, kernel = twice(lambda: rr.solve(m, reg, tol=1e-3, init=start))
    np.testing.assert_array_equal(kernel.steps, 1)
    np.testing.assert_array_equal(loop.status, kernel.status)
    start[1, 3] = np.nan
    loop, kernel = twice(lambda: rr.solve(m, reg, tol=1e-3, init=start))
    np.testing.assert_array_equal(kernel.status, [0, rr.Status.NONFINITE_INPUT])
    np.testing.assert_array_equal(loop.status, kernel.status)


def test_vmap_and_gradients(twice):
    """Axes of `vmap` become lanes, over any leaf and twice; derivatives are those at the certified value."""
    grid: Any = rr.problems.slippery_grid(4, 0.9, dtype=DTYPE)
    rewards = np.asarray(grid.reward) * (1 + 0.1 * np.arange(3, dtype=DTYPE))[:, None, None]
    rows = grid.transitions
    kernels = rr.Successors(rows.indices, rows.probabilities[None] * jnp.ones((2, 1, 1, 1), DTYPE))

    def objective(reward, beta, kernel):
        m = rr.mdp(kernel, reward, 0.9, initial=grid.initial)
        return rr.solve(m, rr.kl(beta), tol=1e-4).objective

    def everything():
        axes = rr.Successors(None, 0)  # type: ignore[arg-type]
        over = jax.vmap(jax.value_and_grad(objective, argnums=(0, 1)), (None, 0, None))
        nested = jax.vmap(over, (0, None, None))(jnp.asarray(rewards), single([1.0, 10.0]), rows)
        each = jax.vmap(objective, (None, None, axes))(grid.reward, single([1.0, 10.0]), kernels)
        return nested, each

    loop, kernel = twice(jax.jit(everything))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3), loop, kernel)


@WHOLE
def test_graphs_of_their_own(twice):
    """`vmap` over successor lists: every lane its own graph."""
    ones = [rr.problems.garnet(20, 3, 2, 0.9, seed=i, dtype=DTYPE) for i in range(3)]
    m = jax.tree.map(lambda *x: jnp.stack(x), *ones)
    reg = rr.kl(single(5.0))
    loop, kernel = twice(lambda: jax.vmap(lambda m: rr.solve(m, reg, tol=1e-3))(m))
    for i in range(3):
        exact = rr.solve(rr.problems.garnet(20, 3, 2, 0.9, seed=i), double(reg))
        assert kernel.status[i] == loop.status[i] == 0
        assert (np.abs(np.asarray(kernel.value[i], float) - exact.value) <= 1e-3).all()


def test_what_is_not_eligible_is_left_to_the_loop(twice):
    """Other solvers, dtypes and regularisers have the same program with and without the kernel, so the same bits."""
    m = rr.problems.slippery_grid(4, 0.9, dtype=DTYPE)
    double_precision = rr.problems.slippery_grid(4, 0.9)
    calls = (
        (m, rr.kl(single(3.0)), rr.ValueIteration(), True),
        (m, rr.kl(single(3.0)), rr.Newton("direct"), True),
        (m, rr.entropy(single(3.0)), None, True),
        (double_precision, rr.kl(3.0), None, True),
        (m, rr.kl(single(3.0)), None, False),  # that it differs says that the texts tell
    )
    for m, reg, solver, same in calls:

        def text(m=m, reg=reg, solver=solver):
            return jax.jit(lambda m, reg: rr.solve(m, reg, solver, tol=1e-3)).lower(m, reg).as_text()

        loop, kernel = twice(text)
        assert (loop == kernel) == ("@robustreg_" not in kernel) == same


def test_a_kernel_that_fails_its_test_is_not_used(carrier, monkeypatch, solving_with):
    """One warning, and the loop."""

    class Broken:
        platform, target = carrier.platform, carrier.target

        def kernel(self, sizes):
            return lambda call: None  # nothing is written

    broken = Broken()
    monkeypatch.setattr(resident_kernel, "_warned", [])
    m = rr.problems.garnet(21, 3, 2, 0.9, dtype=DTYPE)
    with solving_with(broken), pytest.warns(UserWarning, match="without its CUDA kernel"):
        sol = rr.solve(m, rr.kl(single(3.0)), tol=1e-3)
    assert sol.status == 0


@WHOLE
def test_sweeps_calibrations_and_games(twice):
    """What is built on solves is as it was: tables, the strength for a guarantee, explicit play."""
    m = rr.problems.slippery_grid(4, 0.9, dtype=DTYPE)

    def everything():
        jax.clear_caches()  # threads of a sweep do not know where they are to solve
        table = rr.sweep(m, rr.kl(1.0), {"beta": [0.5, 5.0, 50.0], "discount": [0.5, 0.9]}, tol=1e-4)
        game = rr.solve_game(m, rr.kl(single(5.0)), tol=1e-3)
        return [table[name] for name in ("objective", "status")], game.primal, game.dual, game.status

    (loop, *first), (kernel, *second) = twice(everything)
    np.testing.assert_allclose(kernel[0], loop[0], atol=2e-4)
    np.testing.assert_array_equal(kernel[1], 0)
    for a, b in zip(first, second):
        np.testing.assert_allclose(a, b, rtol=5e-3)


def test_lowering_for_a_card_needs_none(monkeypatch, solving_with):
    """One call of the kernel for CUDA, in the place of the loop, and none for a CPU."""

    class Card:
        platform, target = "cuda", "CUDA"

        def kernel(self, sizes):
            return lambda call: None

    card = Card()
    monkeypatch.setattr(resident_kernel, "works", lambda *_: True)
    m = rr.problems.garnet(22, 3, 2, 0.9, dtype=DTYPE)
    with solving_with(card):
        traced = jax.jit(lambda beta: rr.solve(m, rr.kl(beta), tol=1e-3).value).trace(single([1.0, 2.0]))
    for platform, calls in (("cuda", 1), ("cpu", 0)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert text.count("custom_call @robustreg_") == calls


def test_the_environment_turns_it_on(monkeypatch):
    """`ROBUSTREG_KERNEL=1`, and nothing else."""
    monkeypatch.setattr(resident_kernel, "cuda", lambda: "a card")
    for value, found in (("1", "a card"), ("0", None), ("", None)):
        monkeypatch.setenv("ROBUSTREG_KERNEL", value)
        assert resident_kernel.carrier() == found
    monkeypatch.delenv("ROBUSTREG_KERNEL")
    assert resident_kernel.carrier() is None
