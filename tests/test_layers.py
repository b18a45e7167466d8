"""The package is layered: a module imports only from lower layers, and never touches JAX's global settings."""

import ast
import sys
from pathlib import Path

import pytest

import robustreg

ROOT = Path(robustreg.__file__).parent
LAYERS = (
    ("_discrete", "_loops", "_fork"),
    ("_tree", "_host", "_files", "_npz", "_progress", "_settings", "_ffi", "command_line"),
    ("store", "_nvrtc", "names", "_interrupts"),
    ("resident_kernel",),
    ("containers", "table_forms"),
    ("divergences", "patterns", "axes", "parameters", "elimination"),
    ("conjugates", "worst_cases"),
    ("layer",),
    ("regularisers", "transitions"),
    ("successors", "gauge", "masks", "ranges"),
    ("function_checks", "rewards"),
    ("mdp",),
    ("table_input",),
    ("prism_files",),
    ("cassandra_files",),
    ("bellman", "sharding", "stacking", "readings"),
    ("linear", "groups"),
    ("implicit", "solvers"),
    ("solution", "resident"),
    ("solve", "table"),
    ("adversary", "budgets", "certificates", "problems", "baselines"),
    ("interop",),
    ("guarantees", "calibration", "robust_sets", "plan", "pooled", "play", "sweep_outputs"),
    ("game",),
    ("archive",),
    ("problem_files",),
    ("sweep",),
    ("processes",),
    ("drawing",),
    ("config", "figures"),
    ("small_tables",),
    ("paper", "sweep_figures"),
    ("paper_figures", "claims"),
    ("paper_config",),
    ("examples",),
    ("example_config",),
    ("cli",),
    ("__main__",),
)
TOP = ("cli", "__main__")
LAYER = {module: level for level, modules in enumerate(LAYERS) for module in modules}
MODULES = sorted(path.stem for path in ROOT.glob("*.py") if path.stem != "__init__")


def imported_modules(tree):
    """Names of the package's own modules that a syntax tree imports, at any depth."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "robustreg":
                    yield (alias.name.split(".") + ["__init__"])[1]
        elif isinstance(node, ast.ImportFrom):
            path = (node.module or "").split(".") if node.module else []
            if node.level == 0 and path[:1] != ["robustreg"]:
                continue
            inside = path if node.level else path[1:]
            for alias in node.names:
                name = inside[0] if inside else alias.name
                yield name if inside or (ROOT / f"{name}.py").exists() else "__init__"


def test_the_parser_sees_every_form_of_import():
    source = "import robustreg.mdp\nfrom robustreg import solve\nfrom robustreg.linear import x\nfrom . import mdp\n"
    source += "from .game import y\nimport robustreg\nfrom robustreg import __version__\nfrom jax import numpy as jnp\n"
    assert list(imported_modules(ast.parse(source))) == [
        "mdp",
        "solve",
        "linear",
        "mdp",
        "game",
        "__init__",
        "__init__",
    ]


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    assert module in LAYER, f"{module} has no layer: add it to the table"
    tree = ast.parse((ROOT / f"{module}.py").read_text())
    for other in imported_modules(tree):
        if other == "__init__":
            assert module in TOP, f"{module} imports the package itself"
        else:
            assert LAYER[other] < LAYER[module], (
                f"{module} (layer {LAYER[module]}) imports {other} (layer {LAYER[other]})"
            )


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_programs_of_a_user(path):
    """They use public names, and the library's helpers for drawing; nothing but the command line uses them."""
    tree = ast.parse(path.read_text())
    allowed = {"robustreg", "robustreg.drawing", "robustreg.examples.report", "jax", "numpy", "optax"}
    for node in ast.walk(tree):
        named = [f"{node.module}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else []
        named += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in named:
            known = any(f"{name}.".startswith(f"{each}.") for each in allowed - {"robustreg"}) or name == "robustreg"
            assert known or name.split(".")[0] in sys.stdlib_module_names, f"{path.stem} imports {name}"
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("rr."):
            assert not node.attr.startswith("_"), f"{path.stem} uses {ast.unparse(node)}"


@pytest.mark.parametrize("module", [m for m in MODULES if m not in TOP])
def test_no_global_settings(module):
    """The library follows its inputs' dtype; only the command line and the tests choose a precision."""
    for node in ast.walk(ast.parse((ROOT / f"{module}.py").read_text())):
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            assert dotted not in ("jax.config.update", "config.update"), f"{module} writes jax.config"
            assert dotted not in ("jnp.float64", "jax.numpy.float64"), f"{module} fixes a dtype"


def test_public_names():
    """The surface that the documentation promises."""
    names = """MDP mdp Dense Successors MatrixFree KL Alpha kl alpha solve Solution Status SolveError ValueIteration
    ModifiedPolicyIteration Newton Anderson worst_case slack evaluate occupancy certify Certificate from_gymnasium
    save load sweep shard""".split()
    missing = [name for name in names if not hasattr(robustreg, name)]
    assert not missing
    assert [(s.name, int(s)) for s in robustreg.Status] == [
        ("CONVERGED", 0), ("MAX_STEPS", 1), ("STAGNATED", 2), ("NONFINITE_INPUT", 3), ("NONFINITE", 4)
    ]  # fmt: skip
