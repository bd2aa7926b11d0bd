"""What was found in a dataset that is imported, for a person to read and look at."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from mbpo_jax.data.formats.conversion import Facts
from mbpo_jax.data.formats.recording import HOW_TO_LABEL
from mbpo_jax.embodiment import Embodiment
from mbpo_jax.episode import Episode

FAILED = "failures: demonstrations are successes"  # why some are left out


def report_problems(facts: Sequence[Facts]) -> str:
    """Every problem of every bad episode, a line each; empty if there is none."""
    bad = [f for f in facts if f.problems]
    lines = [f"  {f.name}: {problem}" for f in bad for problem in f.problems]
    return "\n".join([f"{len(bad)} of {len(facts)} episodes are bad:", *lines]) if bad else ""


def summarize(facts: Sequence[Facts]) -> str:
    """Counts, tasks, lengths, labels, sizes and ranges of the episodes without problems."""
    good = [f for f in facts if not f.problems]
    kept = [f for f in facts if f.kept]
    rows = [("episodes", f"{len(facts)}, {len(facts) - len(good)} bad, {len(kept)} to be imported")]
    rows += [
        ("task", f"{count} x {instruction!r}")
        for instruction, count in sorted(Counter(f.instruction for f in kept).items())
    ]
    rows += [
        ("left out", f"{count} x {reason}")
        for reason, count in sorted(Counter(f.left_out for f in good if f.left_out).items())
    ]
    if kept:
        lengths = [f.length for f in kept]
        labels = Counter(f.success for f in kept)
        rows += [
            ("lengths", f"{min(lengths)} to {max(lengths)} steps, median {np.median(lengths):.0f}"),
            ("success", f"{labels[True]} labelled so, {labels[None]} without a label"),
            ("control rate", _counts(f.control_rate and f"{f.control_rate:g} Hz" for f in kept)),
            ("proprio", f"{_counts(f.proprio_dim for f in kept)} dimensions"),
        ]
        for camera in kept[0].camera_sizes:
            sizes = _counts("x".join(map(str, f.camera_sizes[camera])) for f in kept)
            rows.append(("camera", f"{camera}, {sizes} (height x width)"))
        rows.append(("frames", f"{_counts(f.orientation for f in kept)} (--orientation)"))
        low, high = _action_range(kept)
        ranges = (f"[{a:.3g}, {b:.3g}]" for a, b in zip(low, high, strict=True))
        rows.append(("actions", " ".join(ranges)))
    return "\n".join(f"{name:<14}{text}" for name, text in rows)


def warnings(
    facts: Sequence[Facts], robot: Embodiment, prompt_problems: Callable[[str], list[str]]
) -> list[str]:
    """What is odd in the episodes without problems, and no fault of a single one for certain.

    Args:
        robot: whose limits the actions should use.
        prompt_problems: what is wrong with an instruction for a model's token budget.
    """
    good = [f for f in facts if not f.problems]
    kept = [f for f in facts if f.kept]
    found = [f"{f.name}: {note}" for f in good for note in f.notes]
    labelled = [f for f in good if f.success is not None]
    failed = [f for f in labelled if not f.success]
    left_out = any(f.left_out == FAILED for f in failed)
    if failed and (len(failed) == len(labelled) or left_out):
        every = "all" if len(failed) == len(labelled) else f"{len(failed)} of"
        found.append(
            f"{' and '.join(sorted({f.label for f in failed}))} is 0 at every row of {every} "
            f"{len(labelled)} labelled episodes ({_some(f.name for f in failed)})"
            + (": is it no label?" if len(failed) == len(labelled) else ".")
            + f" {HOW_TO_LABEL}"
            + (", --stage=rollouts imports failures too" if left_out else "")
        )
    for instruction in dict.fromkeys(f.instruction for f in kept):
        names = _some(f.name for f in kept if f.instruction == instruction)
        found += [f"{names}: {problem}" for problem in prompt_problems(instruction)]
    if kept:
        low, high = _action_range(kept)
        for i, name in enumerate(robot.actions):
            if _is_odd(robot, i, low[i], high[i]):
                bottom, top = robot.action_limits[i]
                found.append(
                    f"{name} takes values from {low[i]:.3g} to {high[i]:.3g} only, its limits are "
                    f"{bottom:.3g} and {top:.3g}: is its unit another? --range={name}=LOW:HIGH "
                    "maps LOW and HIGH of the source onto these limits"
                )
    return found


def _is_odd(robot: Embodiment, dimension: int, low: float, high: float) -> bool:
    """Whether an action that goes from `low` to `high` uses suspiciously little of its limits: a
    gripper not near both, any other less than a twentieth of them, a change one direction only."""
    name, (bottom, top) = robot.actions[dimension], robot.action_limits[dimension]
    span = top - bottom
    if name in robot.grippers:
        return low > bottom + span / 4 or high < top - span / 4
    if low == high:
        return False
    return high - low < span / 20 or (name in robot.deltas and (low >= 0 or high <= 0))


def write_contact_sheet(path: Path, episodes: Mapping[str, Episode]) -> None:
    """A picture of the first frames of episodes, by their names, with a row for each camera."""
    cameras = list(next(iter(episodes.values())).images)
    figure, axes = plt.subplots(
        len(cameras),
        len(episodes),
        figsize=(2.2 * len(episodes), 2.5 * len(cameras)),
        squeeze=False,
        layout="constrained",
    )
    for column, (name, episode) in zip(axes.T, episodes.items(), strict=True):
        for axis, camera in zip(column, cameras, strict=True):
            axis.imshow(episode.images[camera][0])
            axis.set_axis_off()
            axis.set_title(f"{camera}\n{name[-26:]}", fontsize=7, parse_math=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _action_range(facts: Iterable[Facts]) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and highest value of each action dimension."""
    lows, highs = zip(*((f.action_low, f.action_high) for f in facts))
    return np.min(lows, axis=0) + 0.0, np.max(highs, axis=0) + 0.0  # -0.0 would be printed so


def _some(names: Iterable[str]) -> str:
    """The first five names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _counts(values: Iterable[object]) -> str:
    """The different values, with how often each occurs if there are several."""
    counts = Counter("unknown" if value is None else str(value) for value in values)
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{value} ({count})" for value, count in counts.most_common())
