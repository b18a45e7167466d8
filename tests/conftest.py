"""Strict JAX for the whole suite: 64-bit, no implicit rank or dtype promotion, warnings are errors.

Float32 tests run in the same process: they pass float32 arrays, and the dtype of every result follows its inputs.
"""

import itertools
import os

# The suite compiles hundreds of small programs once each, and LLVM's optimisations are half of its time. What the tests
# assert does not depend on them: what is fused, and so rounds together, is decided before. (`benchmarks/honesty.py`
# looks for violated claims in programs as users have them.) Whoever sets XLA_FLAGS decides for themselves.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax  # noqa: E402  # after the flags, which are read once
import pytest  # noqa: E402

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


# Files that take longest, in this order: begun last, one of them would keep one process of two busy alone.
LONGEST = """test_ambiguity test_devices test_resident test_stacking test_undiscounted test_algebra test_honesty
test_calibration test_gymnasium test_game test_certificates test_solvers test_gradients test_masks
test_occupancy_regularisation test_whole_gradients test_orders_per_state test_robust_sets test_examples
test_rounding test_inside_programs test_average test_layer test_chains""".split()


def pytest_addoption(parser):
    parser.addoption("--every", type=int, default=1, metavar="N", help="of the cases of each test, run every N-th")
    parser.addoption("--sample", type=int, default=1, metavar="M", help="of the tests of each file, run every M-th")
    parser.addoption("--slow", type=int, default=1, metavar="M", help="of those marked slow, run every M-th")
    parser.addoption("--turn", type=int, default=0, metavar="K", help="which of them: N (M) turns in a row run all")


def _share(groups, step, turn):
    """Members of groups, every `step`-th of each; where a group has fewer, one."""
    return {member for group in groups for member in group[turn % min(step, len(group)) :: step]}


@pytest.hookimpl(trylast=True)  # after `-m` has taken its own away
def pytest_collection_modifyitems(config, items):
    """Begin with the files that take longest (for several processes, with `--no-loadscope-reorder`); take a share."""
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))
    every, sample, slow, turn = (config.getoption(name) for name in ("every", "sample", "slow", "turn"))
    cases, tests = {}, {sample: {}, sample * slow: {}}
    for item in items:
        test = item.nodeid.partition("[")[0]
        cases.setdefault(test, []).append(item)
        step = sample * slow if item.get_closest_marker("slow") else sample
        tests[step].setdefault(item.path, {})[test] = None
    kept = set()
    for step, files in tests.items():
        chosen = _share([list(found) for found in files.values()], step, turn)
        # (Its cases take the next turn when a test comes round again: with one turn for both, some would never run.)
        kept |= _share([cases[test] for test in chosen], every, turn // step)
    left_out = [item for item in items if item not in kept]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item in kept]


def pytest_configure(config):
    """Turn every warning into an error, whatever the project file says."""
    config.addinivalue_line("filterwarnings", "error")


@pytest.fixture(scope="module", autouse=True)
def _programs_of_one_module():
    """Drop a module's compiled programs at its end: each holds memory maps, of which a process may have 65,530.

    The compiler crashes when there are no more.
    """
    yield
    jax.clear_caches()


_DONE = itertools.count(1)


@pytest.fixture(autouse=True)
def _room_for_more_programs():
    """Drop them earlier in a module that alone comes near that number (an old compiler takes more maps for each)."""
    yield
    if next(_DONE) % 4:
        return
    try:
        with open("/proc/self/maps") as maps:
            many = sum(1 for _ in maps) > 35_000
    except OSError:  # another system, with limits of its own
        return
    if many:
        jax.clear_caches()
