"""`benchmarks/gpu.py` runs in its small size on a CPU: a card is too dear to find typing errors on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"


# All take minutes on a CPU, most of them to compile.
WHOLE = {"rate", "grids", "kernel", "turns", "single", "mixed", "dense", "orders", "sweep", "rest", "tf32", "states"}
SECTIONS = WHOLE if os.environ.get("ROBUSTREG_TEST_KERNEL") == "all" else {"rate", "grids", "dense", "turns", "kernel"}


@pytest.mark.slow
def test_sections_run(tmp_path):
    """No row is an error, and every value that is compared with the truth lies in its interval."""
    some = ",".join(SECTIONS - {"rate"})
    command = [sys.executable, str(SCRIPT), "--size", "small", "--sections", some, "--json", str(tmp_path / "rows")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert {row["section"] for row in rows} == SECTIONS
    assert {row["error"] for row in rows if "error" in row} <= {"no kernel on this device"}
    assert all(row.get("inside", True) and not row.get("failed") and row.get("same", True) for row in rows)
