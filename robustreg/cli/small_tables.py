"""Configurations with a quick version: a table of arguments, perhaps a [problem], and [small] tables that replace.

```toml
[figure]                 # or [example]: the kind of work, and its arguments
kind = "price"
beta = { from = 0.1, to = 100.0, count = 60, spacing = "log" }

[problem]                # for the kinds that need one: as for `robustreg solve`
kind = "chain"

[small.figure]           # optional: what to replace for a quick look (--small)
beta = [0.1, 1.0]
```

Whatever is wrong with a file is a `ConfigError` that names the file, the table, the key, and what is allowed.
"""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from robustreg.cli import config


def read(path: str | Path, name: str, small: bool = False) -> dict[str, Any]:
    """Read the tables of a file.

    Args:
        path: of the file.
        name: of the table that must be there.
        small: with the replacements of its [small] tables.

    Raises:
        ConfigError: the file cannot be read, or it has other tables.
    """
    table = config.read(path)
    if name not in table and (other := config.other_command(table)):
        raise config.ConfigError(f"{path}: no [{name}] table{other}")
    config.refuse_unknown(table, (name, "problem", "small"), str(path))
    replaced = table.pop("small", {})
    sections = {**table, **{f"small.{key}": x for key, x in replaced.items()}} if isinstance(replaced, dict) else {}
    for key, section in (sections or {"small": replaced}).items():
        if not isinstance(section, dict):
            raise config.ConfigError(f"{path}: {key} is {section!r}; expected a table [{key}]")
    config.refuse_unknown(replaced, (name, "problem"), f"{path}: [small]")
    for key in replaced if small else ():
        table[key] = {**table.get(key, {}), **replaced[key]}
    if name not in table:
        raise config.ConfigError(f"{path}: no [{name}] table")
    return table


def arguments(table: Mapping[str, Any], name: str, source: str) -> dict[str, Any]:
    """List the arguments of the table `name`, ranges as their values."""
    where = f"{source}: [{name}]"
    listed = {key: (x, f"{where} {key}") for key, x in table[name].items()}
    return {key: config.values(x, at).tolist() if isinstance(x, dict) else x for key, (x, at) in listed.items()}


def problem(kinds: Mapping[str, Callable[..., Any]], table: Mapping[str, Any], name: str, source: str) -> dict:
    """Build the problem for the kinds that take one.

    Args:
        kinds: what may be called, by name.
        table: of the file.
        name: of the table that says which kind.
        source: of the table, in messages.

    Returns:
        The argument `problem` for the kind, or nothing.

    Raises:
        ConfigError: a [problem] is missing, not wanted, or a batch.
    """
    kind = table[name].get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        return {}  # refused where the kind is looked up
    needed = "problem" in inspect.signature(kinds[kind]).parameters
    if needed != ("problem" in table):
        remedy = "needs a table [problem]" if needed else "takes no [problem]: remove that table"
        raise config.ConfigError(f"{source}: [{name}] kind {kind!r} {remedy}")
    if not needed:
        return {}
    built = config.problem_of(table["problem"], source)
    if built.mdp.batch_shape:
        article = "an" if name[0] in "aeiou" else "a"
        raise config.ConfigError(f"{source}: [problem] describes a batch of problems; {article} {name} takes one")
    return {"problem": built}
