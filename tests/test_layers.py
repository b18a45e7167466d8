"""The package is layered: a module imports only from lower layers, and never touches JAX's global settings."""

import ast
import sys
from pathlib import Path

import pytest

import robustreg

ROOT = Path(robustreg.__file__).parent
# From the lowest to the highest: a package, or a module beside the packages, imports from earlier rows alone.
LAYERS = (
    ("_core",),
    ("regularisers",),
    ("problems",),
    ("solvers",),
    ("adversary",),
    ("game", "losses", "sweeps"),
    ("archive", "solution"),
    ("figures",),
    ("examples",),
    ("cli",),
    ("__main__",),
)
LAYER = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
# What stands above the public face, and may use it as users do.
OUTSIDE = ("examples", "cli", "__main__")
FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")
ROOMS = sorted({path.parts[0].removesuffix(".py") for path in FILES})


def imports(source):
    """Dotted names of the package's own modules that a source imports, at any depth; "" is the package itself."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "robustreg":
                    yield ".".join(alias.name.split(".")[1:])
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute here"
            root, *inside = (node.module or "").split(".")
            for alias in node.names if root == "robustreg" else ():
                # `from robustreg.solvers import linear` imports a module, `... import solve` a name of the face.
                path = ROOT.joinpath(*inside, alias.name)
                is_module = path.is_dir() or path.with_suffix(".py").exists()
                yield ".".join([*inside, alias.name] if is_module else inside)


def test_the_reader_of_imports_sees_every_form():
    source = (
        "import robustreg.solvers.linear\nfrom robustreg import solvers\nfrom robustreg.solvers import linear, solve\n"
    )
    source += "from robustreg.solvers.linear import x\nimport robustreg as rr\nfrom jax import numpy as jnp\n"
    source += "def late():\n    from robustreg.game import minimax\n"
    found = ["solvers.linear", "solvers", "solvers.linear", "solvers", "solvers.linear", "", "game.minimax"]
    assert sorted(imports(source)) == sorted(found)


def test_every_room_has_a_row():
    assert sorted(LAYER) == ROOMS


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_down(room):
    for path in FILES:
        if path.parts[0].removesuffix(".py") == room:
            for other in imports((ROOT / path).read_text()):
                target = other.split(".")[0]
                if not target:
                    assert room in OUTSIDE, f"{path} imports the package itself"
                elif target != room:
                    assert LAYER[target] < LAYER[room], f"{path} imports robustreg.{other}, which is not below {room}"
                else:
                    is_face = path.name == "__init__.py"
                    assert is_face or other != room, f"{path} imports its own package's face: name the module"


@pytest.mark.parametrize("room", ROOMS)
def test_modules_of_a_room_go_in_no_circle(room):
    within = {}
    for path in FILES:
        if path.parts[0] == room and path.name != "__init__.py":
            others = (other.split(".") for other in imports((ROOT / path).read_text()))
            within[path.stem] = {other[1] for other in others if other[0] == room and len(other) > 1}
    while within:  # take away what imports nothing that is left
        free = [module for module, others in within.items() if not others & set(within)]
        assert free, f"modules of {room} that import each other in a circle are among {sorted(within)}"
        for module in free:
            del within[module]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_are_of_a_size_to_be_read(path):
    lines = len((ROOT / path).read_text().splitlines())
    assert lines <= 400, f"{path} has {lines} lines; split it"


@pytest.mark.parametrize("room", [room for room in ROOMS if room not in OUTSIDE])
def test_no_global_settings(room):
    """The library follows its inputs' dtype; only the command line and the tests choose a precision."""
    for path in FILES:
        if path.parts[0].removesuffix(".py") != room:
            continue
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, ast.Attribute):
                dotted = ast.unparse(node)
                assert dotted not in ("jax.config.update", "config.update"), f"{path} writes jax.config"
                assert dotted not in ("jnp.float64", "jax.numpy.float64"), f"{path} fixes a dtype"


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_programs_of_a_user(path):
    """They use public names, and the library's helpers for drawing; nothing but the command line uses them."""
    tree = ast.parse(path.read_text())
    allowed = {"robustreg", "robustreg.figures.style", "robustreg.examples.report", "jax", "numpy", "optax"}
    for node in ast.walk(tree):
        named = [f"{node.module}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else []
        named += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in named:
            known = any(f"{name}.".startswith(f"{each}.") for each in allowed - {"robustreg"}) or name == "robustreg"
            assert known or name.split(".")[0] in sys.stdlib_module_names, f"{path.stem} imports {name}"
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("rr."):
            assert not node.attr.startswith("_"), f"{path.stem} uses {ast.unparse(node)}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_docstrings_say_what_a_function_does(path):
    """A verb and its object first: no article, no formula and no question in its place. (Properties are nouns.)"""
    nouns = {
        "a",
        "an",
        "the",
        "what",
        "how",
        "whether",
        "where",
        "which",
        "same",
        "largest",
        "smallest",
        "value",
        "cost",
    }
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        said = (ast.get_docstring(node) or "").split()
        if said and not any(ast.unparse(mark) == "property" for mark in node.decorator_list):
            assert said[0].lower() not in nouns and said[0][0].isalpha(), f"{path}: {node.name}: {' '.join(said[:8])}"


PUBLIC = """
NormBall Separable Sum TransitionBall Tsallis norm_ball tsallis worst_model
KL MDP Alpha Anderson Average Box Certificate Dense Entropy Features Game Guarantee HalfSpace Horizon MatrixFree
ModifiedPolicyIteration Names Newton Orthant Regulariser RobustSet SharedBudget Solution SolveError StatesOnly Status
Successors SweepError Table Transitions UnnormalisedSet ValueIteration adversary aggregated_slack alpha baselines
calibrate certify critical_beta entropy evaluate from_cassandra from_gymnasium from_prism from_table guarantee kl load
losses mdp nominal_optimum occupancy problems restricted save shard slack solve solve_average solve_game solve_horizon
solve_occupancy OccupancySolution stack sweep trainable worst_case
"""


def test_public_names():
    """The surface that the documentation promises, exactly: a name more or less is a decision."""
    assert sorted(robustreg.__all__) == sorted(PUBLIC.split())
    assert [name for name in robustreg.__all__ if not hasattr(robustreg, name)] == []
    assert [(s.name, int(s)) for s in robustreg.Status] == [
        ("CONVERGED", 0), ("MAX_STEPS", 1), ("STAGNATED", 2), ("NONFINITE_INPUT", 3), ("NONFINITE", 4)
    ]  # fmt: skip


def test_paths_of_earlier_releases():
    """What programs imported before there were packages."""
    from robustreg import adversary, figures, game, problems, regularisers, solvers
    from robustreg.cli import main
    from robustreg.solution import Solution, SolveError, Status

    assert callable(main) and (Solution, SolveError, Status) == (
        robustreg.Solution,
        robustreg.SolveError,
        robustreg.Status,
    )
    old = {
        problems: "bandit chain garnet garnets grid_world ring slippery_grid",
        regularisers: "Alpha KL Regulariser alpha kl",
        solvers: "Anderson ModifiedPolicyIteration Newton Solver Step ValueIteration",
        adversary: "evaluate nominal_optimum occupancy slack worst_case",
        game: "Game solve_game",
        figures: "decision_bars heat_map perturbation_maps policy_map value_map write",
        robustreg.baselines: "norm_attack random_attack single_decision",
    }
    for module, names in old.items():
        assert [name for name in names.split() if not callable(getattr(module, name, None))] == []
