"""Functions that close over traced arrays, made such that they take these as arguments."""

import weakref
from typing import Any

import jax
from jax import Array
from jax.core import Tracer, eval_jaxpr

# Functions that close over nothing that is traced.
_plain: "weakref.WeakKeyDictionary[Any, bool]" = weakref.WeakKeyDictionary()


def explicit(function: Any, *like: Any) -> tuple[Any, tuple[Array, ...]]:
    """Return a function that takes what `function` does, and after it the traced arrays it closes over; and those."""
    if function in _plain:
        return function, ()
    closed = jax.make_jaxpr(function)(*like)
    where = [i for i, x in enumerate(closed.consts) if isinstance(x, Tracer)]
    if not where:
        _plain[function] = True
        return function, ()

    def opened(*arguments: Any) -> Array:
        consts = list(closed.consts)
        for i, x in zip(where, arguments[len(like) :]):
            consts[i] = x
        return eval_jaxpr(closed.jaxpr, consts, *jax.tree.leaves(arguments[: len(like)]))[0]

    return opened, tuple(closed.consts[i] for i in where)
