"""`benchmarks/gpu.py` runs in its small size on a CPU: a card is too dear to find typing errors on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"


@pytest.mark.slow
def test_every_section_runs(tmp_path):
    """No row is an error, and every value that is compared with the truth lies in its interval."""
    command = [sys.executable, str(SCRIPT), "--size", "small", "--json", str(tmp_path / "rows")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    wanted = {"rate", "grids", "kernel", "single", "mixed", "dense", "orders", "sweep", "rest", "tf32", "states"}
    assert {row["section"] for row in rows} == wanted
    assert {row["error"] for row in rows if "error" in row} <= {"no kernel on this device"}
    assert all(row.get("inside", True) and not row.get("failed") and row.get("same", True) for row in rows)
