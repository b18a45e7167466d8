"""Progress of a long run: a bar in a terminal, plain lines elsewhere, or a caller's function."""

import math
import sys
import time
from collections.abc import Callable
from typing import Any


def reporter(progress: Any, total: int, done: int) -> Callable[[int, int], None]:
    """What to call after every chunk, with its number of cells and how many of them failed.

    Args:
        progress: False for silence, True for standard error, or a function of a dict.
        total: cells to do.
        done: how many of them are done already.
    """
    state = {"cells": done, "total": total, "failed": 0, "rate": 0.0, "eta": math.nan}
    begin, before = time.perf_counter(), state["cells"]
    show = progress if callable(progress) else _shown(state) if progress else lambda state: None

    def report(cells: int, failed: int) -> None:
        state["cells"] += cells
        state["failed"] += failed
        state["rate"] = (state["cells"] - before) / (time.perf_counter() - begin)
        state["eta"] = (total - state["cells"]) / state["rate"]
        show(dict(state))

    return report


def _shown(start: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    """Progress on standard error: a bar in a terminal (extra: progress), a line every ten seconds elsewhere."""
    if sys.stderr.isatty():
        try:
            from tqdm import tqdm
        except ModuleNotFoundError:
            pass
        else:
            bar = tqdm(total=start["total"], initial=start["cells"], unit="cell")

            def advance(state: dict[str, Any]) -> None:
                bar.set_postfix(failed=state["failed"], refresh=False)
                bar.update(state["cells"] - bar.n)
                if state["cells"] >= state["total"]:
                    bar.close()

            return advance
    last = -math.inf

    def line(state: dict[str, Any]) -> None:
        nonlocal last
        if state["cells"] >= state["total"] or time.monotonic() - last > 10:
            last = time.monotonic()
            failed = f", {state['failed']} failed" if state["failed"] else ""
            text = f"{state['cells']}/{state['total']} cells, {state['rate']:.0f}/s, {state['eta']:.0f} s left{failed}"
            print(text, file=sys.stderr, flush=True)

    return line
