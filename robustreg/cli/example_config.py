"""Worked pipelines from TOML files: `robustreg example NAME`.

```toml
[example]
kind = "deploy"          # which pipeline: a module of `robustreg.examples`, whose arguments are the other keys
seed = 0

[problem]                # for the kinds that need one: as for `robustreg solve`
kind = "grid_world"
cells = ["...", "S.G"]

[small.example]          # optional: what to replace for a quick look (--small)
worlds = 100
```

The files of the pipelines are in `configs/examples/`; a wheel carries them with it.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

import robustreg as rr
from robustreg._core.files import write_whole
from robustreg.cli import config, small_tables
from robustreg.examples import bandit, decide, deploy, finetune, irl, tune
from robustreg.examples.report import Report
from robustreg.figures import style

_MODULES = (deploy, irl, finetune, decide, bandit, tune)
KINDS: dict[str, Callable[..., Report]] = {module.__name__.rpartition(".")[2]: module.run for module in _MODULES}


def listed() -> dict[str, str]:
    """List what there is: names of pipelines and a line about each."""
    return {name: str(module.__doc__).partition("\n")[0] for name, module in zip(KINDS, _MODULES)}


def load(name: str, small: bool = False, seed: int | None = None) -> Report:
    """Run a pipeline, in the precision that JAX is set to.

    Args:
        name: of a pipeline, or the path of a TOML file.
        small: with the replacements of its [small] tables.
        seed: in the place of the file's.

    Raises:
        ConfigError: there is no such pipeline, or something in its file is not allowed.
        SolveError: a problem in it could not be solved.
    """
    path = str(find(name))
    table = small_tables.read(path, "example", small)
    arguments = small_tables.arguments(table, "example", path)
    if seed is not None:
        arguments["seed"] = seed
    supplied = small_tables.problem(KINDS, table, "example", path)
    return config.construct(KINDS, arguments, f"{path}: [example]", supplied=supplied)


def find(name: str) -> Path:
    """Find the file of a pipeline: a path as it is, a name among the configurations of this checkout or wheel."""
    if Path(name).suffix == ".toml":
        return Path(name)
    if name not in KINDS:
        raise config.ConfigError(f"no example {name!r}; allowed: {', '.join(sorted(KINDS))}, or a file NAME.toml")
    here = Path(rr.__file__).parent
    places = [folder / f"{name}.toml" for folder in (here.parent / "configs" / "examples", here / "examples")]
    return next((place for place in places if place.exists()), places[-1])


def write(report: Report, out: Path, name: str) -> list[Path]:
    """Write `NAME.npz`, and if matplotlib is installed `NAME.png`, into an existing folder."""
    path = out / f"{Path(name).stem}.npz"
    write_whole(path, lambda file: np.savez(file, **report.numbers))
    return [path, *(style.write_figures(out, {path.stem: report.draw()}) if style.available() else [])]
