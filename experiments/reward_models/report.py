"""The numbers of reward models and their page."""

from collections.abc import Mapping, Sequence

import numpy as np

from mbpo_jax.reporting.figures import COLORS, plt
from mbpo_jax.reporting.page import Section, Table, png, render
from mbpo_jax.stages.fit_value import auc
from mbpo_jax.world_model.metrics import calibration, classification, f1_interval

HEADER = ("model", "F1 (95 %)", "precision", "recall", "accuracy", "AUC", "calibration")


def row(probability: np.ndarray, index: np.ndarray) -> dict:
    """All numbers of one model.

    Args:
        probability: P(Yes) [N].
        index: int [N, 3], of each frame its episode, its place there and its label.
    """
    label = index[:, 2]
    return (
        classification(probability, label)
        | {
            "f1_interval": f1_interval(probability, label, index[:, 0]),
            "auc": auc(probability, label > 0.5),
            "episodes": len(np.unique(index[:, 0])),
        }
        | calibration(probability, label)
    )


def cells(rows: Mapping[str, dict]) -> list[tuple[str, ...]]:
    return [
        (
            name,
            "{:.2f} ({:.2f}–{:.2f})".format(one["f1"], *one["f1_interval"]),
            *(f"{one[key]:.2f}" for key in ("precision", "recall", "accuracy", "auc")),
            f"{one['calibration_error']:.3f}",
        )
        for name, one in rows.items()
    ]


def table(rows: Mapping[str, dict]) -> str:
    """One line per model, with how much was measured."""
    one = next(iter(rows.values()))
    lines = ["".join(f"{cell:<19}" if i < 2 else f"{cell:>12}" for i, cell in enumerate(line))
             for line in (HEADER, *cells(rows))]  # fmt: skip
    return "\n".join(
        [*lines, f"{one['frames']} frames ({one['yes_frames']} done) of {one['episodes']} episodes"]
    )


def draw(pictures: Sequence[Mapping]):
    """P(Yes) over the steps of episodes; grey: the task is done."""
    columns = min(3, len(pictures))
    rows = -(-len(pictures) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3 * columns, 1.9 * rows), squeeze=False, sharey=True
    )
    for axis in axes.flat[len(pictures) :]:
        axis.axis("off")
    for axis, one in zip(axes.flat, pictures):
        done = [step for step, label in zip(one["steps"], one["label"]) if label]
        if done:
            axis.axvspan(min(done) - 1, max(done) + 1, color="0.85", lw=0)
        for color, (name, probability) in zip(COLORS, one["models"].items()):
            axis.plot(one["steps"], probability, ".-", color=color, lw=1.2, ms=4, label=name)
        axis.set_title(f"episode {one['episode']}", fontsize=9)
        axis.set_xlabel("environment step")
        axis.set_ylim(-0.05, 1.05)
    axes[0, 0].set_ylabel("P(Yes)")
    axes[0, 0].legend(fontsize=7, loc="upper left")
    return figure


def page(suite: str, rows: Mapping[str, dict], pictures: Sequence[Mapping]) -> str:
    """The HTML page."""
    one = next(iter(rows.values()))
    return render(
        title="Reward models",
        subtitle=f"{suite}: {one['frames']} held-out frames, {one['yes_frames']} of them done, of "
        f"{one['episodes']} episodes",
        verdict="Intervals are bootstrapped over episodes; frames between 10 and 5 steps before "
        "the end of a success have no label.",
        sections=[
            Section("Is the task done?", tables=[Table(HEADER, cells(rows))]),
            Section(
                "Over time", images=[png(draw(pictures), "grey: done; failures are never done")]
            ),
        ],
        config="",
    )
