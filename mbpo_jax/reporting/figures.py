"""The report's pictures, each a matplotlib figure of recorded numbers."""

from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

POLICY_COLORS = {"sft": "#8da0cb", "improved": "#e07b39", "improved_best": "#5a9367"}
COLORS = ("#e07b39", "#3b6ea5", "#5a9367", "#9b5094", "#b8a13a", "#7a7a7a")
plt.rcParams.update(
    {
        "figure.dpi": 110,
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "legend.frameon": False,
        "figure.constrained_layout.use": True,
    }
)


def success_bars(groups: Mapping[str, Mapping[str, dict]]) -> Figure:
    """Success rates with their 95 % Wilson intervals: group of episodes -> policy -> its
    `success_rate`."""
    names = list(next(iter(groups.values())))
    figure, axis = plt.subplots(figsize=(max(3.6, 0.5 * len(groups) * len(names) + 1.4), 3.0))
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        parts = [policies[name] for policies in groups.values()]
        rates = np.array([p["success_rate"] for p in parts])
        ends = np.array([p["interval"] for p in parts])
        x = np.arange(len(groups)) + (i - (len(names) - 1) / 2) * width
        errors = np.abs(ends.T - rates)
        axis.bar(x, rates, width * 0.92, color=POLICY_COLORS.get(name, COLORS[i]), label=name)
        axis.errorbar(x, rates, errors, fmt="none", ecolor="#333333", capsize=3, lw=1)
        for xi, part in zip(x, parts):
            text = f"{part['successes']}/{part['episodes']}"
            axis.text(xi, 0.015, text, ha="center", fontsize=7, color="#222222")
    axis.set_xticks(range(len(groups)), list(groups))
    axis.set_ylim(0, 1)
    axis.set_ylabel("success rate")
    figure.legend(loc="outside upper center", ncols=min(len(names), 2 * len(groups)))
    return figure


def curves(panels: Sequence[tuple[str, Mapping[str, tuple[Sequence, Sequence]]]]) -> Figure:
    """A row of line plots: (title, {line name: (steps, values)}) each."""
    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.1 * len(panels), 2.6), squeeze=False, sharex=False
    )
    for axis, (title, lines) in zip(axes[0], panels):
        for color, (name, (steps, values)) in zip(COLORS, lines.items()):
            axis.plot(steps, values, color=color, lw=1.4, label=name)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step")
        if len(lines) > 1:
            axis.legend(fontsize=7)
    return figure


def film_strip(real: np.ndarray, imagined: np.ndarray, camera: str) -> Figure:
    """Rows of real over imagined frames.

    Args:
        real, imagined: uint8 [strips, n + 1, H, W, 3]; column 0 is the common start.
    """
    strips, columns = real.shape[:2]
    figure, axes = plt.subplots(
        2 * strips, columns, figsize=(1.25 * columns + 0.5, 2.55 * strips), squeeze=False
    )
    for row in range(2 * strips):
        frames = (real if row % 2 == 0 else imagined)[row // 2]
        for column in range(columns):
            axis = axes[row, column]
            axis.imshow(frames[column], interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.grid(visible=False)
            for side in axis.spines.values():
                side.set_visible(False)
            if row == 0:
                title = "start" if column == 0 else f"+{column} chunk{'s' if column > 1 else ''}"
                axis.set_title(title, fontsize=8)
        axes[row, 0].set_ylabel("real" if row % 2 == 0 else "imagined", fontsize=8)
    figure.suptitle(camera, fontsize=9)
    return figure


def against_horizon(views: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """PSNR after 1..n chunks: view -> line name -> [n]; the last line is a baseline."""
    figure, axes = plt.subplots(1, len(views), figsize=(3.6 * len(views), 2.8), squeeze=False)
    for axis, (camera, lines) in zip(axes[0], views.items()):
        for i, (name, values) in enumerate(lines.items()):
            last = i == len(lines) - 1
            style = {"color": COLORS[5], "ls": "--"} if last else {"color": COLORS[i]}
            axis.plot(range(1, len(values) + 1), values, marker="o", ms=4, label=name, **style)
        axis.set_xticks(range(1, len(values) + 1))
        axis.set_title(camera, fontsize=9)
        axis.set_xlabel("chunks imagined")
        axis.set_ylabel("PSNR (dB)")
    axes[0, -1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def motion(views: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]) -> Figure:
    """Imagined against real pixel change by decile: view -> line name -> {"real", "imagined"}."""
    figure, axes = plt.subplots(1, len(views), figsize=(3.4 * len(views), 2.9), squeeze=False)
    for axis, (camera, lines) in zip(axes[0], views.items()):
        for color, (name, change) in zip(COLORS, lines.items()):
            axis.plot(change["real"], change["imagined"], "o-", ms=4, color=color, label=name)
        end = max(max(change["real"]) for change in lines.values())
        axis.plot([0, end], [0, end], ls="--", color=COLORS[5], label="as real")
        axis.set_title(camera, fontsize=9)
        axis.set_xlabel("real change (grey levels)")
        axis.set_ylabel("imagined change")
    axes[0, -1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def reliability(models: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """Share of "Yes" against predicted probability: name -> (probability, share, count) per bin;
    the dots' area is the number of frames."""
    figure, axis = plt.subplots(figsize=(4.6, 3.0))
    axis.plot([0, 1], [0, 1], ls="--", color=COLORS[5], label="calibrated")
    for color, (name, bins) in zip(COLORS, models.items()):
        probability, share, count = (np.asarray(x) for x in bins)
        used = count > 0
        area = 8 + 120 * count[used] / count.sum()
        axis.plot(probability[used], share[used], color=color, lw=1, label=name)
        axis.scatter(probability[used], share[used], area, color=color)
    axis.set_xlabel("predicted probability that the task is done")
    axis.set_ylabel("share of done frames")
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure
