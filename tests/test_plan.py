"""What is solved with what in a sweep: every cell once, along paths on which beta rises, and started well."""

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import robustreg as rr

plan: Any = import_module("robustreg.sweeps.plan")
digests: Any = import_module("robustreg.sweeps.digests")
engine: Any = import_module("robustreg.sweeps.runner")
M = rr.problems.chain(discount=0.9)
GARNETS = rr.problems.garnets(7, n_states=6, n_actions=3, branching=3, discount=0.9)


def numbers(n):
    """Betas in no order."""
    return np.random.default_rng(n).permutation(np.geomspace(0.1, 300, n))


CASES = {
    "one beta": (M, {"beta": numbers(1)}, False),
    "a short line": (M, {"beta": numbers(5)}, False),
    "a long line": (M, {"beta": numbers(333)}, False),
    "short lines": (M, {"discount": np.linspace(0.1, 0.9, 50), "beta": numbers(3)}, False),
    "long lines": (M, {"beta": numbers(150), "discount": [0.5, 0.99, 0.9], "alpha": [0.5, 2.0]}, False),
    "no line": (M, {"discount": np.linspace(0.1, 0.9, 77)}, False),
    "zipped": (M, {"discount": np.linspace(0.1, 0.9, 40), "beta": numbers(40)}, True),
    "many MDPs": (GARNETS, {"beta": numbers(11)}, False),
}
DEVICES = {
    "cpu": [SimpleNamespace(platform="cpu")],
    "gpu": [SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": 2**33})],
}


def made(case, where, chunk=None):
    m, grid, zipped = CASES[case]
    return plan.make_plan(m, rr.alpha(1.0, 1.0), grid, ("gap",), zipped, chunk, DEVICES[where])


@pytest.mark.parametrize("chunk", [None, 1, 3, 64])
@pytest.mark.parametrize("where", DEVICES)
@pytest.mark.parametrize("case", CASES)
def test_every_cell_is_on_one_path_along_which_beta_rises(case, where, chunk):
    made_of = made(case, where, chunk)
    cells = np.concatenate([made_of.cells(job) for job in range(made_of.n_chunks)])
    np.testing.assert_array_equal(np.sort(cells), np.arange(made_of.size))
    assert made_of.width <= (chunk or 256) or where == "gpu"
    assert made_of.paths.shape[1] <= plan._LONGEST and (made_of.paths[:, 0] >= 0).all()
    for job in range(made_of.n_chunks):
        lanes, layout = made_of.lanes(job), made_of.layout(job)
        assert layout.shape == (made_of.paths.shape[1], made_of.width)
        for name, x in lanes.items():
            assert x.shape[:2] == layout.shape and np.isfinite(x).all()
            if name in made_of.values and made_of.zipped:
                np.testing.assert_array_equal(x[layout >= 0], made_of.values[name][layout[layout >= 0]])
        # From one place to the next, beta alone changes, and rises, unless a line begins there.
        for i in range(1, len(layout)):
            if not made_of.begins[i]:
                both = (layout[i] >= 0) & (layout[i - 1] >= 0)
                assert (lanes["beta"][i] >= lanes["beta"][i - 1]).all() and (
                    np.diff(lanes["beta"][i - 1 : i + 1][:, both], axis=0) > 0
                ).all()
                assert all((x[i] == x[i - 1]).all() for name, x in lanes.items() if name != "beta")


def test_lanes_of_a_batch_are_about_as_hard():
    """The same part of a line, of one discount or of near ones, as long as there are enough of them."""
    discounts = np.concatenate([np.linspace(0.5, 0.6, 20), np.linspace(0.99, 0.992, 20)])
    made_of = plan.make_plan(
        M, rr.kl(1.0), {"discount": discounts, "beta": numbers(96)}, ("gap",), False, 4, DEVICES["cpu"]
    )
    for job in range(made_of.n_chunks):
        lanes = made_of.lanes(job)
        assert (np.ptp(lanes["beta"], axis=1) == 0).all() and np.ptp(lanes["discount"]) < 0.11


def test_paths_are_no_shorter_than_needed():
    """Few cells go along one path on a CPU, and all at once on an accelerator; many keep every core busy."""
    many = plan.make_plan(M, rr.kl(1.0), {"beta": numbers(50_000)}, ("gap",), False, None, DEVICES["gpu"])
    assert many.paths.shape == (3847, 13) and many.n_chunks == 1  # they are too small to keep it busy otherwise
    assert made("a short line", "cpu").paths.shape == (1, 5) and made("a short line", "gpu").paths.shape == (5, 1)
    assert made("a long line", "cpu").n_chunks >= 4 and made("a long line", "gpu").n_chunks == 1


def test_an_accelerator_is_busy_and_shares():
    """First paths of 16 cells, then chunks for eight devices, then longer paths, then more side by side."""
    m = rr.problems.garnet(1024, 2, 2, 0.9)  # of which 512 paths keep an accelerator busy
    big = [SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": 2**36})]

    def sizes(n, *outputs):
        found = plan.make_plan(m, rr.kl(1.0), {"beta": np.geomspace(0.1, 10, n)}, outputs, False, None, big)
        return found.paths.shape[1], found.width, found.n_chunks

    assert sizes(500) == (1, 500, 1) and sizes(2000) == (4, 500, 1) and sizes(8000) == (16, 500, 1)
    assert sizes(65536) == (16, 512, 8) and sizes(262144) == (64, 512, 8)
    assert sizes(1_000_000) == (64, 1954, 8) and sizes(10_000_000)[1] > 4000
    # A tenth of the memory holds the array outputs of a chunk.
    length, width, _ = sizes(1_000_000, "policy", "value")
    assert 8 * 1024 * 3 * length * width <= 2**36 / 10


def test_array_outputs_of_a_cpu_are_bounded():
    kernel = rr.Successors(jnp.zeros((1_000_000, 4, 1), jnp.int32), jnp.ones((1_000_000, 4, 1)))
    m = rr.mdp(kernel, np.zeros((1_000_000, 4)), 0.9)
    found = plan.make_plan(m, rr.kl(1.0), {"beta": numbers(100)}, ("policy", "gap"), False, None, DEVICES["cpu"])
    assert found.width * found.paths.shape[1] * 8 * 4_000_000 <= 2**28
    assert found.n_chunks * found.width * found.paths.shape[1] >= 100


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_a_polynomial_is_continued_exactly(degree):
    rng = np.random.default_rng(degree)
    weights = rng.normal(size=(degree + 1, 3, 5))
    xs = np.linspace(0.5, 0.1, 5)[:, None] + rng.uniform(-0.03, 0.03, size=(5, 3))
    values = np.sum([w * xs[..., None] ** i for i, w in enumerate(weights)], axis=0)
    found = engine._continued(jnp.asarray(values[1:]), jnp.asarray(xs[1:]), jnp.asarray(xs[0]))
    np.testing.assert_allclose(found, values[0], rtol=1e-12, atol=1e-12)


def test_what_is_not_there_is_left_out():
    """Without a past the start is 0; with one value, that; a failed cell, or a repeated beta, cuts the past there."""
    states = np.array([0.0, 10.0])
    values = np.arange(1.0, 5.0)[::-1][:, None, None] * np.ones((4, 6, 1)) + states
    xs = np.arange(1.0, 5.0)[::-1][:, None] * np.ones((4, 6))
    values[:, 0] = np.nan
    values[1:, 1] = np.nan
    values[0, 2] = np.nan
    values[2:, 3] = np.nan
    xs[1, 4] = xs[0, 4]
    found = engine._continued(jnp.asarray(values), jnp.asarray(xs), jnp.full(6, 5.0))
    expected = np.array([0, 4, 0, 5, 4, 5.0])[:, None] + np.array([0, 1, 0, 1, 1, 1])[:, None] * states
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_neighbours_but_for_rounding_have_no_direction():
    """Nor do values that change by as much as they differ among states: the start is 0 then."""
    values = np.array([[0.0, 10.0], [1e-6, 10.0], [5.0, 0.0]])
    near = engine._continued(*(jnp.asarray(x) for x in _past(values, [1 + 1e-14, 1.0, 0.0])), jnp.asarray([5.0]))
    np.testing.assert_array_equal(near[0], values[0])
    far = engine._continued(*(jnp.asarray(x) for x in _past(values[1:], [1.0, 0.0])), jnp.asarray([2.0]))
    np.testing.assert_array_equal(far[0], 0.0)
    m, betas = rr.problems.ring(50, 0.99, slip=0.01), np.array([10, 10 * (1 + 1e-14), 1e3])
    warm = rr.sweep(m, rr.kl(1.0), {"beta": betas}, tol=1e-3)["steps"]
    assert warm.sum() <= np.asarray(rr.solve(m, rr.kl(betas), tol=1e-3).steps).sum()


def _past(values, xs):
    """Arguments of `_continued` for one path."""
    values = np.concatenate([values[:, None], np.full((4 - len(values), 1, values.shape[1]), np.nan)])
    return values, np.concatenate([np.array(xs)[:, None], np.zeros((4 - len(xs), 1))])


def test_a_bend_is_not_extrapolated_through():
    """Where the values stop moving, the last ones lead, not a cubic through the bend."""
    values = np.array([1.0, 1.0, 0.0, -5.0])[:, None, None] * np.ones((4, 1, 2))
    found = engine._continued(jnp.asarray(values), jnp.asarray([[4.0], [3.0], [2.0], [1.0]]), jnp.asarray([5.0]))
    np.testing.assert_allclose(found, 1.0)


def test_starts_save_most_steps():
    """Along a line of 64 betas, two backups certify a cell that takes eight alone."""
    m, betas = rr.problems.slippery_grid(8, 0.99), np.geomspace(0.1, 300, 64)
    warm = rr.sweep(m, rr.kl(1.0), {"beta": betas}, tol=1e-3)["steps"]
    cold = np.asarray(jax.device_get(rr.solve(m, rr.kl(betas[:, None]), tol=1e-3).steps))
    assert warm.mean() < 3 and warm.sum() < 0.4 * cold.sum()


def test_a_line_starts_anew():
    """Cells take the steps that they take without the lines before theirs on the path."""
    discounts, betas = np.resize([0.3, 0.97], 24), [0.1, 1.0, 10.0]
    table = rr.sweep(M, rr.kl(1.0), {"discount": discounts, "beta": betas}, tol=1e-8, chunk=1)
    for i in range(2):
        alone = rr.sweep(M, rr.kl(1.0), {"discount": discounts[i : i + 1], "beta": betas}, tol=1e-8, chunk=1)
        np.testing.assert_array_equal(table["steps"][i::2], np.broadcast_to(alone["steps"], (12, 3)))


def test_where_a_class_is_defined_is_not_part_of_a_sweep():
    """Modules move from release to release, and addresses from process to process."""
    structure = str(jax.tree.structure((rr.problems.chain(3, 0.9), rr.alpha(2.0, 1.0))))
    assert "robustreg.problems" in structure and "robustreg." not in digests._lasting(structure)
    assert "MDP" in digests._lasting(structure) and "Alpha" in digests._lasting(structure)
    assert digests._lasting("f at 0x7f00") == "f"
