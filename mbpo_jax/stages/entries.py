"""Entries of a config one by one: the numbers and choices that each may be."""

import math
import types
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from mbpo_jax.stages.build import Config
from mbpo_jax.training.checkpoints import flat_entries


class Number(NamedTuple):
    """The numbers from `low` to `high`; without `low` itself where `above`, without `high` where
    `below`."""

    low: float = 0.0
    high: float = math.inf
    above: bool = False
    below: bool = False

    def has(self, x: float) -> bool:
        ends = (self.above and x == self.low) or (self.below and x == self.high)
        return math.isfinite(x) and self.low <= x <= self.high and not ends

    def __str__(self) -> str:
        low = f"{'above' if self.above else 'from'} {self.low:.10g}"
        if self.high == math.inf:
            return low
        return f"{low} to {'below ' if self.below else ''}{self.high:.10g}"


COUNT = Number(1, 10**9)  # of anything there must be one of
COUNT_OR_NONE = Number(0, 10**9)
POSITIVE = Number(above=True)
SHARE = Number(high=1)
BELOW_ONE = Number(high=1, below=True)


def check_entries(
    config: Config,
    numbers: Mapping[str, Number],
    choices: Mapping[str, Sequence[str]] = types.MappingProxyType({}),
) -> None:
    """Each entry by the first pattern of `numbers`, and of `choices`, that its name matches. Whole
    numbers that match none are counts, other numbers are finite.

    Raises:
        ValueError: entries that are something else; names each with its value and what it may be.
    """
    wrong = []
    for name, value in flat_entries(config.to_dict()).items():
        known = [values for pattern, values in choices.items() if fnmatchcase(name, pattern)]
        if known and value not in known[0]:
            wrong.append(f"{name} is {value!r}: one of {', '.join(known[0])}")
        for part in value if isinstance(value, tuple | list) else (value,):
            if problem := _number_problem(name, part, numbers):
                wrong.append(f"{name} is {value!r}: {problem}")
    refuse(dict.fromkeys(wrong))


def refuse(wrong: Iterable[str]) -> None:
    """Raises ValueError with all lines, if there are any."""
    lines = "".join(f"\n  {line}" for line in wrong)
    if lines:
        raise ValueError(f"the config cannot be used (--config.ENTRY=VALUE changes one):{lines}")


def _number_problem(name: str, value: Any, numbers: Mapping[str, Number]) -> str | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"numbers {numbers[name]}" if name in numbers else None
    default = COUNT if isinstance(value, int) else Number(-math.inf)
    limits = next((r for p, r in numbers.items() if fnmatchcase(name, p)), default)
    if limits.has(value):
        return None
    kind = "whole" if isinstance(value, int) else "finite"
    return f"a {kind} number{'' if limits.low == -math.inf else f' {limits}'}"
