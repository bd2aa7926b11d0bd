"""Counting the floating-point operations of a program's matrix products."""

import math
from collections.abc import Callable

import jax


def matmul_flops(function: Callable, *arguments) -> float:
    """Multiplications and additions of all matrix products and convolutions that
    `function(*arguments)` executes; loops count as often as they run, of a `cond` the most
    expensive branch. Arguments may be abstract (`jax.ShapeDtypeStruct`).

    Raises:
        ValueError: the program has a `while_loop`, whose number of rounds is not known.
    """
    return program_flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def program_flops(jaxpr) -> float:
    """As `matmul_flops`, of a program that is traced already."""
    total = 0.0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = parameters["dimension_numbers"]
            left = equation.invars[0].aval.shape
            depth = math.prod(left[i] for i in contracted)
            total += 2.0 * depth * math.prod(equation.outvars[0].aval.shape)
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            outputs = kernel[parameters["dimension_numbers"].rhs_spec[0]]
            taps = math.prod(kernel) / outputs
            total += 2.0 * taps * math.prod(equation.outvars[0].aval.shape)
        elif name == "scan":
            total += parameters["length"] * program_flops(parameters["jaxpr"].jaxpr)
        elif name == "cond":
            total += max(program_flops(branch.jaxpr) for branch in parameters["branches"])
        elif name == "while":
            if program_flops(parameters["body_jaxpr"].jaxpr):
                raise ValueError("a while_loop with matrix products: their number is not known")
        else:
            total += sum(program_flops(inner) for inner in _inner(parameters))
    return total


def _inner(parameters) -> list:
    """The programs among an equation's parameters (jit, remat, custom derivatives)."""
    values = [getattr(value, "jaxpr", value) for value in parameters.values()]
    return [value for value in values if hasattr(value, "eqns")]
