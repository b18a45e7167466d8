"""Progress of a long run: a bar in a terminal, plain lines elsewhere, or a caller's function."""

import contextlib
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any


def reporter(progress: Any, total: int, done: int) -> Callable[[int, int], None]:
    """Make what to call after every chunk, with its number of cells and how many of them failed.

    Args:
        progress: False for silence, True for standard error, or a function of a dict: `cells` done of `total`, how many
            `failed`, and, NaN for the first chunk, cells per second (`rate`) and seconds left (`eta`).
        total: cells to do.
        done: how many of them are done already.
    """
    state = {"cells": done, "total": total, "failed": 0, "rate": math.nan, "eta": math.nan}
    show = progress if callable(progress) else _shown(state) if progress else lambda state: None
    begin, before, first = time.perf_counter(), done, True

    def report(cells: int, failed: int) -> None:
        nonlocal begin, before, first
        now = time.perf_counter()
        state["cells"] += cells
        state["failed"] += failed
        if first:  # until now the program was being compiled, which says nothing of the rest
            begin, before, first = now, state["cells"], False
        else:
            state["rate"] = (state["cells"] - before) / max(now - begin, 1e-9)
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
            bar = tqdm(total=start["total"], initial=start["cells"], unit="cell", desc="compiling", smoothing=0)

            def advance(state: dict[str, Any]) -> None:
                bar.set_postfix(failed=state["failed"], refresh=False)
                bar.update(state["cells"] - bar.n)
                if bar.desc:  # what is left is told by the rate from here on
                    bar.set_description("")
                    bar.initial, bar.start_t = bar.n, time.time()
                if state["cells"] >= state["total"]:
                    bar.close()

            return advance
    last = -math.inf
    _say(f"{start['cells']}/{start['total']} cells, compiling")

    def line(state: dict[str, Any]) -> None:
        nonlocal last
        if state["cells"] >= state["total"] or time.monotonic() - last > 10:
            last = time.monotonic()
            rate, eta = state["rate"], state["eta"]
            known = "" if math.isnan(rate) else f", {rate:.{0 if rate >= 10 else 1}f}/s, {eta:.0f} s left"
            failed = f", {state['failed']} failed" if state["failed"] else ""
            _say(f"{state['cells']}/{state['total']} cells{known}{failed}")

    return line


def _say(line: str) -> None:
    """Write a line to standard error at once: `print` writes its end apart, and another thread may come between."""
    print(line + "\n", end="", file=sys.stderr, flush=True)


@contextlib.contextmanager
def waiting() -> Iterator[None]:
    """Tell who waits at a terminal, every few seconds, that a program is being compiled."""
    begin, over = time.perf_counter(), threading.Event()

    def tell() -> None:
        while not over.wait(3.0):
            seconds = time.perf_counter() - begin
            _say(f"compiling and solving, {seconds:.0f} s")

    if sys.stderr.isatty():
        threading.Thread(target=tell, daemon=True).start()
    try:
        yield
    finally:
        over.set()
