"""`benchmarks/gpu.py` runs in its small size on a CPU: a card is too dear to find typing errors on."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
verdicts = importlib.import_module("asked").verdicts

# All take minutes on a CPU, most of them to compile.
WHOLE = {
    "rate",
    "grids",
    "kernel",
    "turns",
    "single",
    "mixed",
    "dense",
    "orders",
    "double",
    "sweep",
    "rest",
    "tf32",
    "states",
}
SECTIONS = WHOLE if os.environ.get("ROBUSTREG_TEST_KERNEL") == "all" else {"rate", "grids", "dense", "turns", "kernel"}


def test_what_is_asked_of_a_card():
    """Rows that meet every line, rows that miss each, and rows of which nothing is asked."""
    row = lambda section, problem, lanes, method, seconds: {  # noqa: E731
        "section": section, "problem": problem, "lanes": lanes, "method": method, "seconds": seconds
    }  # fmt: skip
    hand = [
        row("grids", name, n, method, seconds)
        for name, n in (("grid 16 0.99", 256), ("grid 16 0.9", 4096), ("grid 16 0.99", 65_536))
        for method, seconds in (("careful", 10.0), ("vmapped", 100.0))
    ]
    hand += [row("dense", "4096 dense 64", 4096, "careful", 10.0), row("grids", "grid 16 0.99", 256, "everything", 9.0)]
    solve = lambda x: [  # noqa: E731
        row("grids", "grid 16 0.99", 256, "solve", 1 / x),
        row("grids", "grid 16 0.9", 4096, "solve", 2 / x),
        row("grids", "grid 16 0.99", 65_536, "solve", 2 / x),
        row("dense", "4096 dense 64", 4096, "solve", 5 / x),
        row("sweep", "grid 16 0.99", 1_000_000, "sweep", 0.3 / x),
        row("single", "grid 16", 1, "value", 4e-4 / x) | {"first_s": 1.5 / x},
        {"section": "mixed", "problem": "together", "lanes": 9, "seconds": 1.0, "of_the_sum": 1.3 / x},
        {"section": "grids", "problem": "grid 16 0.9", "lanes": 256, "method": "solve", "error": "no memory"},
    ]
    fine, slow = (list(verdicts(hand + solve(x))) for x in (1.01, 0.19))
    assert len(fine) == len(slow) == 11 and all(line["holds"] for line in fine)
    assert not any(line["holds"] for line in slow if line["lanes"] != 65_536)
    assert [line["least"] for line in fine if "careful" in line["method"]] == [10, 5, 1, 2]


@pytest.mark.slow
def test_sections_run(tmp_path):
    """No row is an error, and every value that is compared with the truth lies in its interval."""
    some = ",".join(SECTIONS - {"rate"})
    command = [
        sys.executable,
        str(BENCHMARKS / "gpu.py"),
        "--size",
        "small",
        "--sections",
        some,
        "--json",
        str(tmp_path / "rows"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert {row["section"] for row in rows} == SECTIONS | {"asked"}
    assert any("least" in row for row in rows) and all(
        isinstance(row["holds"], bool) for row in rows if row["section"] == "asked"
    )
    assert {row["error"] for row in rows if "error" in row} <= {"no kernel on this device"}
    assert all(row.get("inside", True) and not row.get("failed") and row.get("same", True) for row in rows)
