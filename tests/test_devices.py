"""Several devices: four that the CPU pretends to have, in a process of their own, because this one has a single device.

The child runs one function of this file after the other and reports what went wrong with each; here every function is
a test that looks its report up.
"""

import functools
import json
import os
import re
import subprocess
import sys
import threading
import time
import traceback
import warnings
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import robustreg as rr
from robustreg.solvers import krylov

# Many compilations: the run on the oldest releases leaves this file out.
pytestmark = pytest.mark.slow

CHAIN, BETAS = rr.problems.chain(discount=0.9), np.geomspace(0.1, 30, 1600)
OUTPUTS = ("objective", "gap", "steps", "status", "value", "policy", "perturbation")
SOLVE: Any = import_module("robustreg.solvers.loop")
engine: Any = import_module("robustreg.sweeps.runner")


def dense(m):
    """The same MDP with its transitions written out."""
    p = np.asarray(m.transitions.expect(np.eye(m.n_states)))  # [S', S, A]
    return rr.mdp(np.moveaxis(p, 0, -1), m.reward, m.discount, m.initial)


def ending(m):
    """The same MDP with episodes that may end."""
    kernel = rr.Successors(m.transitions.indices, 0.9 * m.transitions.probabilities)
    return rr.mdp(kernel, m.reward, m.discount, termination=np.full(m.reward.shape, 0.1))


GARNET = rr.problems.garnet(n_states=40, n_actions=3, branching=5, discount=0.95)
KINDS = {"successors": lambda: GARNET, "dense": lambda: dense(GARNET), "ending": lambda: ending(GARNET)}


def swept(devices=None):
    """A sweep of 25 chunks; always the same program, which is compiled once for each device."""
    return rr.sweep(CHAIN, rr.kl(1.0), {"beta": BETAS}, outputs=OUTPUTS, tol=1e-8, chunk=1, devices=devices)


def rows_on_each_device(x, axis):
    """Length of an axis of a sharded array on each device."""
    return [part.data.shape[axis] for part in x.addressable_shards]


def gathered(text):
    """Sizes of what the devices of a compiled program send each other, collective by collective."""
    found = re.findall(r"= (.*?) (?:all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter)", text)
    return [int(np.prod([int(n) for n in dims.split(",") if n])) for x in found for dims in re.findall(r"\[(.*?)\]", x)]


# ---- what the child does


def child_sums_of_an_accelerator_add_up_over_devices():
    """Whether blocks of states fit the devices' shares or not; no vector is collected anywhere if they do."""
    mesh = Mesh(np.array(jax.devices()), ("states",))
    for n in (4, 40, 64, 256):
        x = np.random.default_rng(n).normal(size=(n, 3))
        placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec("states")))
        run = jax.jit(krylov.sums_of_blocks)
        for found, expected in zip(run(placed, placed**2), (x, x**2)):
            np.testing.assert_allclose(found, expected.sum(0), atol=1e-12)
        if n % 64 == 0:
            assert max(gathered(run.lower(placed, placed**2).compile().as_text())) <= 6


def child_sweeps_are_the_same_bits_on_every_set_of_devices():
    used = set()
    original = engine._solve_chunk

    def watched(run, placed, device, job):
        mdp = placed[0]
        assert mdp.reward.devices() == {device}
        if device not in {other for other, _ in used}:
            used.add((device, id(mdp.reward)))
            everyone.wait(60)  # so that none is late for a chunk
        used.add((device, id(mdp.reward)))
        return original(run, placed, device, job)

    engine._solve_chunk = watched
    tables = {}
    for count in (1, 3, None):
        used.clear()
        everyone = threading.Barrier(count or 4)
        devices = None if count is None else jax.local_devices()[:count]
        tables[count] = swept(devices)
        assert len({device for device, _ in used}) == (count or 4), used
        assert len(used) == (count or 4), "the problem is placed once for each device"
    engine._solve_chunk = original
    for count in (3, None):
        for name in OUTPUTS:
            np.testing.assert_array_equal(tables[count][name], tables[1][name], err_msg=name)


def child_a_slow_device_takes_fewer_chunks_and_holds_nobody_up():
    slow, done = jax.local_devices()[2], []
    original = engine._solve_chunk

    def watched(run, placed, device, job):
        fields = original(run, placed, device, job)
        time.sleep(2.0 if device == slow else 0.02)
        done.append(device)
        return fields

    engine._solve_chunk = watched
    swept()
    engine._solve_chunk = original
    assert len(done) == 25 and done.count(slow) <= 2, done


def child_an_error_on_one_device_ends_the_sweep():
    original, tried, everyone = engine._solve_chunk, [], threading.Barrier(4)

    def broken(run, placed, device, job):
        tried.append(job)
        if len(tried) <= 4:
            everyone.wait(60)  # each has a chunk in its hands
        if device == jax.local_devices()[1]:
            raise RuntimeError("no memory left on this device")
        return original(run, placed, device, job)

    engine._solve_chunk = broken
    try:
        with pytest.raises(RuntimeError, match="no memory left"):
            swept()
        assert threading.active_count() == 1, "nobody works on"
    finally:
        engine._solve_chunk = original


def slow_child_sharded_lanes_are_solved_where_they_lie():
    mesh = Mesh(np.array(jax.devices()), ("lanes",))
    betas = np.geomspace(0.1, 30, 8)
    spread = jax.device_put(jnp.asarray(betas), NamedSharding(mesh, PartitionSpec("lanes")))
    sol, alone = rr.solve(GARNET, rr.kl(spread), tol=1e-8), rr.solve(GARNET, rr.kl(betas), tol=1e-8)
    assert np.abs(np.asarray(sol.value) - np.asarray(alone.value)).max() <= 2e-8
    for name in ("value", "policy", "perturbation", "lower", "upper", "status", "steps", "objective"):
        assert rows_on_each_device(getattr(sol, name), 0) == [2] * 4, name
    assert rr.certify(GARNET, rr.kl(spread), sol).raise_if_loose(1e-7) is not None


def regulariser(kind, betas):
    beta = np.array(betas) if len(betas) > 1 else float(*betas)
    return rr.alpha(1.5, beta) if kind == "dense" else rr.kl(beta)


@functools.cache
def of_one_device(kind, betas):
    return rr.solve(KINDS[kind](), regulariser(kind, betas), tol=1e-8)


def check_states(kind, *betas, devices=None, pad=False):
    """A sharded solve, against that of one device; returns the sharded MDP, the regulariser and the solution."""
    alone, n = of_one_device(kind, betas), GARNET.n_states
    small = rr.shard(KINDS[kind](), devices, pad=pad)
    reg = regulariser(kind, betas)
    sol = rr.solve(small, reg, tol=1e-8)
    assert (np.asarray(sol.status) == 0).all()
    assert np.abs(np.asarray(sol.value)[..., :n] - np.asarray(alone.value)).max() <= 2e-8
    assert np.abs(np.asarray(sol.policy)[..., :n, :] - np.asarray(alone.policy)).max() <= 1e-6
    np.testing.assert_allclose(sol.objective, alone.objective, atol=2e-8)
    return small, reg, sol


def check_that_nothing_large_travels(kind, *betas):
    small, reg, sol = check_states(kind, *betas)
    big = jax.tree.leaves(small.transitions)
    assert all(rows_on_each_device(x, 0) == [10] * 4 for x in (*big, small.reward, small.initial))
    for name, axis in (("value", -1), ("policy", -2), ("perturbation", -2), ("q", -2), ("upper", -1)):
        assert rows_on_each_device(getattr(sol, name), axis) == [10] * 4, (kind, name)
    arguments = SOLVE.Tolerance.read(1e-8, np.float64), jnp.asarray(1000, jnp.int32), None, None
    # (As `solve` hands it over: having seen that no discount is 1.)
    sizes = gathered(SOLVE._solve.lower(small._with_sparsity(), reg, None, *arguments).compile().as_text())
    # The largest is a value per state and lane: transitions and policies never travel.
    assert max(sizes) == 40 * len(betas), (kind, max(sizes))


def child_states_stay_on_their_devices():
    check_that_nothing_large_travels("successors", 1.0, 3.0)


def slow_child_states_stay_on_their_devices_whatever_the_kind():
    check_that_nothing_large_travels("dense", 2.0)
    check_that_nothing_large_travels("ending", 2.0)


def slow_child_other_functions_take_a_sharded_mdp():
    small, reg, sol = check_states("successors", 2.0)
    alone = of_one_device("successors", (2.0,))
    assert rr.certify(small, reg, sol).raise_if_loose(1e-7) is not None
    np.testing.assert_allclose(rr.occupancy(small, sol.policy), rr.occupancy(GARNET, alone.policy), atol=1e-5)
    np.testing.assert_allclose(rr.evaluate(small, sol.policy), rr.evaluate(GARNET, alone.policy), atol=1e-5)

    def objective(m, beta):
        return rr.solve(m, rr.kl(beta), tol=1e-10).objective

    mine, truth = (jax.grad(objective, (0, 1), allow_int=True)(m, jnp.asarray(2.0)) for m in (small, GARNET))
    np.testing.assert_allclose(mine[0].reward, truth[0].reward, atol=1e-7)
    np.testing.assert_allclose(mine[1], truth[1], atol=1e-7)
    assert rows_on_each_device(mine[0].transitions.probabilities, 0) == [10] * 4


def slow_child_any_number_of_states_fits_when_padded():
    with pytest.raises(ValueError, match=r"40 states do not divide by 3 devices: .* pass pad=True to add 2 states"):
        rr.shard(GARNET, jax.devices()[:3])
    for kind in ("successors", "dense"):
        small, _, sol = check_states(kind, 2.0, devices=jax.devices()[:3], pad=True)
        assert sol.value.shape == (42,) and rows_on_each_device(sol.value, 0) == [14] * 3
        np.testing.assert_array_equal(sol.value[40:], np.repeat(sol.value[39:40], 2))
        assert (np.asarray(small.transitions.push(np.ones((42, 3))))[40:] == 0).all()


def slow_child_lanes_and_states_together():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("lanes", "states"))
    betas = np.array([1.0, 2.0, 3.0, 4.0])
    spread = jax.device_put(jnp.asarray(betas), NamedSharding(mesh, PartitionSpec("lanes")))
    sol = rr.solve(rr.shard(GARNET, mesh), rr.kl(spread), tol=1e-8)
    alone = rr.solve(GARNET, rr.kl(betas), tol=1e-8)
    assert np.abs(np.asarray(sol.value) - np.asarray(alone.value)).max() <= 2e-8
    assert {part.data.shape for part in sol.value.addressable_shards} == {(2, 20)}
    with pytest.raises(ValueError, match="no axis 'rows'; there are: lanes, states"):
        rr.shard(GARNET, mesh, axis="rows")


def one_step(reg, x):
    """Every one-step method on logits `[rows, A]`, and a gradient through each."""
    p, logs = jax.nn.softmax(x), jax.nn.log_softmax(x)
    return {
        "argmax": reg.argmax(x),
        "conjugate": reg.conjugate(x),
        "value": reg.value(p),
        "worst_case": rr.worst_case(reg, p),
        "worst_case of logs": rr.worst_case(reg, log_policy=logs),
        "slack": rr.slack(reg, x),
    }


def child_a_vocabulary_sharded_over_devices():
    """The partitioner knows no reduction of another form than its own; nothing but sums over rows is exchanged."""
    rng, mesh = np.random.default_rng(0), Mesh(np.array(jax.devices()), ("words",))
    x, prior = rng.normal(size=(6, 64)), rng.dirichlet(np.ones(64), 6)

    def spread(y):
        return jax.device_put(y, NamedSharding(mesh, PartitionSpec(None, "words")))

    def gradients(reg, x):
        return jax.jacrev(lambda reg, x: {k: (v**2).sum() for k, v in one_step(reg, x).items()}, (0, 1))(reg, x)

    for make in (lambda p: rr.kl(2.0, p), lambda p: rr.alpha(1.5, 2.0, p), lambda p: rr.entropy(2.0)):
        here, there = make(prior), make(spread(prior))
        for f in (one_step, jax.jit(one_step), jax.jit(gradients)):
            wanted, found = f(here, x), f(there, spread(x))
            jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-9, atol=1e-12), wanted, found)
    text = jax.jit(lambda reg, x: reg.argmax(x)).lower(rr.kl(2.0, spread(prior)), spread(x)).compile().as_text()
    assert max(gathered(text)) <= 6, "whole rows travel"


FAST, SLOW = ([name for name in list(globals()) if name.startswith(start)] for start in ("child_", "slow_child_"))


def run(names, path):
    """In the child: one after the other."""
    warnings.simplefilter("error")
    assert len(jax.devices()) == 4
    found = {}
    for name in names:
        try:
            globals()[name]()
            found[name] = ""
        except BaseException:
            found[name] = traceback.format_exc()
    Path(path).write_text(json.dumps(found))


# ---- here


def reports(names, folder):
    path, tests = folder / "reports.json", Path(__file__).parent
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    search = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": search, "JAX_PLATFORMS": "cpu"}
    line = [sys.executable, "-c", f"import conftest, test_devices; test_devices.run({names!r}, {str(path)!r})"]
    child = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=600)
    assert child.returncode == 0, child.stderr
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    return reports(FAST, tmp_path_factory.mktemp("fast"))


@pytest.fixture(scope="module")
def slow(tmp_path_factory):
    return reports(SLOW, tmp_path_factory.mktemp("slow"))


@pytest.mark.parametrize("name", FAST)
def test_with_four_devices(name, fast):
    assert fast[name] == "", fast[name]


@pytest.mark.parametrize("name", SLOW)
def test_more_with_four_devices(name, slow):
    assert slow[name] == "", slow[name]


def test_lanes_of_an_accelerator_follow_the_memory_of_that_very_device():
    """A tenth of its memory holds a dozen arrays of action values; what a device does not tell is taken for 8 GiB."""
    plan: Any = import_module("robustreg.sweeps.plan")
    kernel = rr.Successors(jnp.zeros((1000, 10, 1), jnp.int32), jnp.ones((1000, 10, 1)))
    m = rr.mdp(kernel, np.zeros((1000, 10)), 0.9)

    def device(memory, platform="gpu"):
        return SimpleNamespace(platform=platform, memory_stats=lambda: memory)

    row = 1000 * 10 * 8
    assert plan.device_width(m, device({"bytes_limit": 12 * row * 1000})) == 100
    assert (
        plan.device_width(m, device(None)) == plan.device_width(m, device({})) == int(0.1 * 2**33 / (12 * row)) == 894
    )
    assert plan.device_width(m, device({"bytes_limit": 1})) == 1
    assert plan.device_width(m, device({"bytes_limit": 2**50})) == 4096
    assert plan.device_width(m, device({"bytes_limit": 2**50}, "cpu")) == 4
    grid, many = {"beta": np.ones(5000)}, [device({"bytes_limit": 12 * row * n}) for n in (5000, 300, 1000)]
    assert plan.make_plan(m, rr.kl(1.0), grid, ("gap",), False, None, many).width == 30  # the smallest must hold it
    assert plan.make_plan(m, rr.kl(1.0), grid, ("gap",), False, None, many[:1]).width == 500


def test_devices_that_cannot_be():
    m = rr.problems.chain()
    for wrong in ([], ["cpu"]):
        with pytest.raises(TypeError, match="devices must be a sequence of jax devices"):
            rr.sweep(m, rr.kl(1.0), {"beta": [1.0]}, devices=wrong)
    kernel = rr.MatrixFree(lambda v: jnp.stack([v, v], -1), n_states=4, n_actions=2)
    with pytest.raises(TypeError, match="shard its parameters with jax.device_put"):
        rr.shard(rr.mdp(kernel, np.zeros((4, 2)), 0.9))
