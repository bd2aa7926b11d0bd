"""What was found in a dataset that is imported, for a person to read and look at."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from mbpo_jax.data.importers.recording import Facts
from mbpo_jax.episode import Episode


def add_disagreements(facts: Iterable[Facts]) -> None:
    """Adds to the kept episodes that differ from most others in what all must share a problem that
    says so."""
    kept = [f for f in facts if f.kept]
    for name, attribute in (
        ("control rate in Hz", "control_rate"),
        ("proprio size", "proprio_dim"),
    ):
        values = Counter(getattr(f, attribute) for f in kept)
        usual, count = values.most_common(1)[0] if values else (None, 0)
        for f in kept:
            value = getattr(f, attribute)
            if value != usual:
                f.problems.append(
                    f"its {name} is {value}, while {count} of {len(kept)} episodes have {usual}"
                )


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
        low = np.min([f.action_low for f in kept], axis=0) + 0.0  # -0.0 would be printed so
        high = np.max([f.action_high for f in kept], axis=0) + 0.0
        ranges = (f"[{a:.3g}, {b:.3g}]" for a, b in zip(low, high, strict=True))
        rows.append(("actions", " ".join(ranges)))
    return "\n".join(f"{name:<14}{text}" for name, text in rows)


def spread(count: int, wanted: int) -> list[int]:
    """At most `wanted` of the numbers below `count`, evenly spread."""
    return np.linspace(0, count - 1, min(count, wanted)).astype(int).tolist()


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
            axis.set_title(f"{camera}\n{name[-26:]}", fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _counts(values: Iterable[object]) -> str:
    """The different values, with how often each occurs if there are several."""
    counts = Counter("unknown" if value is None else str(value) for value in values)
    if len(counts) == 1:
        return next(iter(counts))
    return ", ".join(f"{value} ({count})" for value, count in counts.most_common())
