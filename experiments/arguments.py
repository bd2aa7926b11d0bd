"""Numbers on a command line: what is out of range is one message of `argparse`."""

import argparse
import math
from collections.abc import Callable
from typing import Any


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], Any]:
    """The `type` of an argument that is a finite number from `low` to `high`."""
    name = "a whole number" if kind is int else "a number"
    limits = f"{name} from {low:g}" + (f" to {high:g}" if high < math.inf else "")

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high):
            raise argparse.ArgumentTypeError(f"{text!r} is not {limits}")
        return value

    return parse


def numbers(low: int, high: float = math.inf) -> Callable[[str], list[int]]:
    """The `type` of an argument that is a comma-separated list of such whole numbers."""
    parse = number(int, low, high)
    return lambda text: [parse(part) for part in text.split(",")]
