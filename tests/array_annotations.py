"""Checks what functions say of the shapes and dtypes of arrays, for jaxtyping's import hook.

Only arrays are checked. The known checkers of all types refuse what is right here: JAX fills the
records of a tree with things that are no arrays, tests put simple objects in the place of a policy
or a world, and most cannot read its annotations.
"""

import functools
import inspect
import types
import typing

import numpy as np
from jaxtyping import AbstractArray


def checked(function):
    """The function, with its arguments and what it returns checked against its annotations."""
    signature = inspect.signature(function)
    hints = {name: p.annotation for name, p in signature.parameters.items()}
    hints["return"] = signature.return_annotation
    hints = {name: hint for name, hint in hints.items() if _has_arrays(hint)}
    if not hints or function.__name__ == "__init__":
        return function

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        values = signature.bind(*args, **kwargs).arguments
        values = values | {"return": function(*args, **kwargs)}
        for name, hint in hints.items():
            if name in values and not _fits(values[name], hint):
                raise TypeError(f"{function.__qualname__}: {name} is not {hint}")
        return values["return"]

    return wrapper


def _is_array(hint) -> bool:
    return isinstance(hint, type) and issubclass(hint, AbstractArray)


def _has_arrays(hint) -> bool:
    return _is_array(hint) or any(_has_arrays(part) for part in typing.get_args(hint))


def _fits(value, hint) -> bool:
    if _is_array(hint):
        if isinstance(value, np.ndarray):  # which JAX takes for one of its own
            hint = hint.dtype[np.ndarray, hint.dim_str]
        return isinstance(value, hint)
    kind, parts = typing.get_origin(hint), typing.get_args(hint)
    if kind in (types.UnionType, typing.Union):
        return any(_fits(value, part) for part in parts)
    if kind is tuple and Ellipsis not in parts:
        return len(value) == len(parts) and all(map(_fits, value, parts))
    if not _has_arrays(hint):
        return hint is not type(None) or value is None
    if isinstance(value, dict):
        return all(_fits(part, parts[-1]) for part in value.values())
    if isinstance(value, list | tuple):
        return all(_fits(part, parts[0]) for part in value)
    return True
