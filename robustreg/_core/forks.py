"""Refuse to compute in a process that was forked from one in which JAX had started.

JAX has threads, which a fork does not copy: the first program of the child waits for them for ever.
"""

import os

_started = _forked = False


def refuse() -> None:
    """Note that JAX is used here; refuse where it was used before a fork.

    Raises:
        RuntimeError: in the child of a fork.
    """
    global _started
    if _forked:
        raise RuntimeError(
            "this process was forked from one that had used JAX already, whose threads a fork does not copy: it would "
            'wait for ever. Start processes by multiprocessing.get_context("spawn") or "forkserver", or call robustreg '
            "in the children only"
        )
    _started = True


def _in_child() -> None:
    global _forked
    _forked = _started


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
