"""The result of `stages.evaluate_suites` as one table of text."""

from collections.abc import Mapping

_TITLES = ("suite", "task", "success", "95 %", "steps", "instruction")


def suite_table(results: Mapping) -> str:
    """A line for every task, every suite and every drop against an unperturbed suite. "steps" is an
    episode's mean length; where episodes go on to their end, "reached" counts those in which the
    task was done at any time."""
    until_end = results["until_end"]
    titles = [*_TITLES[:4], *(["reached"] * until_end), *_TITLES[4:]]
    rows = [titles]
    for name, result in results["suites"].items():
        summary = result["summary"]
        parts = [(task, part) for task, part in summary["tasks"].items()]
        if len(parts) > 1:
            parts.append(("all", summary))
        for task, part in parts:
            rows.append(
                [
                    name,
                    task,
                    f"{part['successes']}/{part['episodes']} = {100 * part['success_rate']:.0f} %",
                    _interval(part["interval"]),
                    *([f"{part['reached']}/{part['episodes']}"] * until_end),
                    f"{part['mean_length']:.0f}",
                    part.get("instruction", ""),
                ]
            )
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(x.ljust(w) for x, w in zip(row, widths)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * w for w in widths[:-1]))
    for name, result in results["suites"].items():
        if "drop" in result:
            drop = result["drop"]
            low, high = (100 * x for x in drop["interval"])
            lines.append(
                f"{name} against {drop['against']}: success is {100 * drop['drop']:.0f} points "
                f"lower (95 %: {low:.0f} to {high:.0f})"
            )
    return "\n".join(lines)


def _interval(interval: tuple[float, float]) -> str:
    return "–".join(f"{100 * x:.0f}" for x in interval)
