"""What is asked of a card, held against the rows that `benchmarks/gpu.py` measured there."""

from collections.abc import Iterator
from typing import Any

Row = dict[str, Any]

# Seconds of a sweep of so many lanes, and of one problem, by method; of every first call of one problem.
_SWEEP, _SINGLE, _FIRST = {1_000_000: 0.3}, {"value": 4e-4, "value, gradient": 8e-4}, 1.5
# A call with lanes of unlike discounts, relative to the calls apart.
_TOGETHER = 1.3


def verdicts(rows: list[Row]) -> Iterator[Row]:
    """Compare rows with what is asked.

    Args:
        rows: as `gpu.py` shows them; those with an error are passed over.

    Yields:
        rows with `measured`, `least` or `most`, and whether it `holds`.
    """
    fine = [row for row in rows if "error" not in row]
    times: dict[tuple[str, str, int, str], float] = {
        (row["section"], row["problem"], row["lanes"], row["method"]): row["seconds"]
        for row in fine
        if {"problem", "lanes", "method", "seconds"} <= row.keys()
    }
    for (section, problem, lanes, method), seconds in times.items():
        about: Row = {"problem": problem, "lanes": lanes}
        if section in ("grids", "dense") and method == "solve":
            for other, least in (("careful", _least(section, problem, lanes)), ("vmapped", 50)):
                if (section, problem, lanes, other) in times:
                    ratio = times[section, problem, lanes, other] / seconds
                    about["method"] = f"{other} hand / solve"
                    yield {"section": "asked"} | about | {"measured": ratio, "least": least, "holds": ratio >= least}
        if section == "sweep" and lanes in _SWEEP:
            yield _at_most(about | {"method": "seconds"}, seconds, _SWEEP[lanes])
        if section == "single" and method in _SINGLE:
            yield _at_most(about | {"method": f"{method}, seconds"}, seconds, _SINGLE[method])
    for row in fine:
        about = {"problem": row.get("problem"), "lanes": row.get("lanes")}
        if row["section"] == "single":
            yield _at_most(about | {"method": f"{row['method']}, first call"}, row["first_s"], _FIRST)
        if "of_the_sum" in row:
            yield _at_most(about | {"method": "together / apart"}, row["of_the_sum"], _TOGETHER)


def _least(section: str, problem: str, lanes: int) -> float:
    """Return how often as fast as careful hand a solve is to be; never slower, whatever the size."""
    if section == "dense":
        return 2 if problem == "4096 dense 64" and lanes == 4096 else 1
    if lanes not in (256, 4096):
        return 1
    return 5 if problem.endswith(" 0.9") else 10


def _at_most(about: Row, measured: float, most: float) -> Row:
    return {"section": "asked"} | about | {"measured": measured, "most": most, "holds": measured <= most}
