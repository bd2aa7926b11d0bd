"""Figures of the compounding-error report. Each takes `results` and returns a Figure."""

import numpy as np
from matplotlib.figure import Figure

from experiments.theory import claims

COLOURS = {
    "published": "#c0392b",
    "corrected": "#1f618d",
    "saturating": "#7d3c98",
    "exact": "#1e1e1e",
    "step": "#d68910",
    "chunk": "#148f77",
    "composed": "#d68910",
}
REWARD_STYLES = {"given": "-", "accumulated": "--", "decoded": ":"}
SETTING_TITLES = {
    "markov": "markov: only data is missing",
    "floor": "floor: every prediction errs a little",
    "phased": "phased: step model misspecified",
}


def _figure(columns: int, rows: int = 1, width: float = 4.6, height: float = 3.5):
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained", dpi=110)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def coefficients(results: dict, against: str) -> Figure:
    """Coefficients of ε_π and ε_m against "n", "k" or "gamma"."""
    table = results["coefficients"][against]
    x = np.array(table["axis"], float)
    label = {"n": "branch length n (chunks)", "k": "chunk length k (steps)", "gamma": "1/(1−γ)"}
    if against == "gamma":
        x = 1 / (1 - x)
    figure, axes = _figure(2, width=5.2, height=4.2)
    for axis, error, title in zip(axes[0], ("eps_pi", "eps_m"), ("ε_π", "ε_m")):
        for kind, alpha in (("branch", 1.0), ("full", 0.45)):
            lines = [("published", "-", f"published {kind}")]
            lines += [
                ("corrected", style, f"corrected {kind}, {rewards}")
                for rewards, style in REWARD_STYLES.items()
            ]
            for family, style, name in lines:
                y = np.array(table[name][error], float)
                axis.plot(
                    x, np.where(y > 0, y, np.nan), style, color=COLOURS[family], alpha=alpha,
                    label=name, linewidth=2.2 if kind == "branch" else 1.6,
                )  # fmt: skip
        axis.set_yscale("log")
        if against == "n":
            axis.xaxis.get_major_locator().set_params(integer=True)
        else:
            axis.set_xscale("log")
        axis.set_xlabel(label[against])
        axis.set_title(f"coefficient of {title}")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def ratios(results: dict) -> Figure:
    """Distribution of gap/bound on random problems, and the adversarial maximum, per claim."""
    random, adversarial = results["random"], results["adversarial"]
    edges = np.array(random["log10_edges"])
    figure, axes = _figure(1, width=10, height=0.38 * len(claims.CLAIMS) + 1.2)
    axis = axes[0, 0]
    for row, claim in enumerate(reversed(claims.CLAIMS)):
        counts = np.array(random["claims"][claim.name]["histogram"], float)
        counts[0] = 0  # exact zeros are clipped into the first bin
        heights = 0.8 * counts / max(counts.max(), 1)
        colour = COLOURS[claim.family]
        axis.fill_between(
            edges[:-1], row, row + heights, step="post", color=colour, alpha=0.35, linewidth=0
        )
        largest = np.log10(max(random["claims"][claim.name]["largest"], 1e-6))
        axis.plot([largest], [row + 0.12], "|", color=colour, markersize=9, markeredgewidth=2)
        ratio = adversarial[claim.name]["ratio"]
        place = min(np.log10(ratio), 0.75)
        axis.plot([place], [row + 0.12], ">" if ratio > 5 else "o", color=colour, markersize=6)
        text = f"{ratio:.3f}" if ratio < 100 else f"{ratio:.0e}"
        axis.text(0.88, row + 0.12, text, va="center", fontsize=8, color=colour)
    axis.axvline(0, color="black", linewidth=1)
    axis.set_yticks(np.arange(len(claims.CLAIMS)) + 0.15)
    axis.set_yticklabels([claim.name for claim in reversed(claims.CLAIMS)], fontsize=8)
    axis.set_xlim(-6, 1.3)
    axis.set_ylim(-0.3, len(claims.CLAIMS))
    axis.set_xticks(range(-6, 1))
    axis.set_xticklabels([f"$10^{{{tick}}}$" if tick else "1" for tick in range(-6, 1)])
    axis.set_xlabel(
        "gap / bound: histogram and largest (bar) on random problems;\n"
        "adversarial maximum (dot or arrow, value at the right)"
    )
    return figure


def trade_off(results: dict) -> Figure:
    """The exact gap with its two parts against n, and the bounds against n."""
    curves = results["trade_off"]["curves"]
    n = curves["n"]
    figure, axes = _figure(2, width=5.2, height=3.9)
    left, right = axes[0]
    left.plot(n, curves["exact"], color=COLOURS["exact"], linewidth=2.2, label="exact gap")
    left.plot(n, curves["off_policy_part"], "--", color=COLOURS["corrected"],
              label="off-policy part (no model error)")  # fmt: skip
    left.plot(n, curves["model_part"], "--", color=COLOURS["step"], label="model part")
    best = curves["optimal_n"]["exact"]
    left.plot([best], [curves["exact"][best]], "o", color=COLOURS["exact"], label=f"n* = {best}")
    left.set_ylabel("mean |gap| of the return")
    for name in ("published", "corrected", "saturating"):
        best = curves["optimal_n"][name]
        right.plot(n, curves[name], color=COLOURS[name], linewidth=2, label=f"{name}, n* = {best}")
        right.plot([best], [curves[name][best]], "o", color=COLOURS[name], clip_on=False)
    right.plot(n, curves["exact"], color=COLOURS["exact"], linewidth=2, label="exact gap")
    right.set_yscale("log")
    for axis in (left, right):
        axis.set_xlabel("branch length n (chunks)")
        axis.legend(fontsize=8, frameon=False)
    return figure


def best_n_maps(results: dict) -> Figure:
    """n* over policy shift and model error: exact and by each bound."""
    study = results["trade_off"]
    ticks = range(len(study["axis"]))
    figure, axes = _figure(4, width=3.4, height=3.6)
    longest = study["curves"]["n"][-1]
    for axis, name in zip(axes[0], ("exact", "published", "corrected", "saturating")):
        values = np.array(study["maps"][name], float)
        image = axis.imshow(
            np.log1p(values), origin="lower", cmap="viridis", vmin=0, vmax=np.log1p(longest)
        )
        for (i, j), value in np.ndenumerate(values):
            colour = "white" if np.log1p(value) < 0.6 * np.log1p(longest) else "black"
            axis.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=7, color=colour)
        axis.grid(visible=False)
        axis.set_title(f"n* by {name}" if name != "exact" else "exact n*", fontsize=10)
        labels = [f"{value:.2g}" for value in study["axis"]]
        axis.set_xticks(ticks, labels, fontsize=7, rotation=45)
        axis.set_yticks(ticks, labels, fontsize=7)
        axis.set_xlabel("model perturbation")
    axes[0, 0].set_ylabel("policy shift")
    figure.colorbar(image, ax=axes[0].tolist(), label="log(1 + n*)", fraction=0.02, pad=0.01)
    return figure


def _settings(results: dict, width=4.4, height=3.6):
    figure, axes = _figure(3, width=width, height=height)
    study = results["learned"]
    for axis, (setting, rows) in zip(axes[0], study["settings"].items()):
        axis.set_title(SETTING_TITLES[setting], fontsize=10)
        yield figure, axis, setting, rows


def learned_errors(results: dict) -> Figure:
    """ε_m against the number of episodes."""
    for figure, axis, _, rows in _settings(results):  # noqa: B007
        episodes = [row["episodes"] for row in rows]
        for name, key, style in (
            ("step model, per step", "step", ":"),
            ("step model, composed", "composed", "-"),
            ("chunk model", "chunk", "-"),
        ):
            axis.loglog(
                episodes, [row[f"eps_m_{key}"] for row in rows], style, marker="o", markersize=4,
                color=COLOURS[key], label=name,
            )  # fmt: skip
        axis.set_xlabel("episodes N")
        axis.set_ylabel("ε_m, data policy")
    axis.legend(fontsize=8, frameon=False)
    return figure


def learned_gaps(results: dict) -> Figure:
    """Exact gaps and both bounds against the number of episodes."""
    n = results["config"]["n"]
    for figure, axis, _, rows in _settings(results):  # noqa: B007
        episodes = [row["episodes"] for row in rows]
        lines = (
            ("published full", "published", ":", [row["published_full"] for row in rows]),
            ("corrected full", "corrected", ":", [row["corrected_full"] for row in rows]),
            (f"published, n={n}", "published", "-", [row["published_branch"][n] for row in rows]),
            (f"corrected, n={n}", "corrected", "-", [row["corrected_branch"][n] for row in rows]),
            ("gap, full, step model", "step", ":", [row["gap_full_accumulated"] for row in rows]),
            (f"gap, n={n}, step model", "step", "-", [row["gap_branch_step"][n] for row in rows]),
            (f"gap, n={n}, chunk model", "chunk", "-",
             [row["gap_branch_chunk"][n] for row in rows]),
        )  # fmt: skip
        for name, colour, style, values in lines:
            axis.loglog(episodes, values, style, color=COLOURS[colour], label=name)
        axis.axhline(
            results["learned"]["range"], color="grey", linewidth=1, label="range of returns"
        )
        axis.set_xlabel("episodes N")
    figure.axes[0].set_ylabel("gap of the return")
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def horizon(results: dict) -> Figure:
    """Compounding error of the imagined state distribution against the horizon."""
    for figure, axis, _, rows in _settings(results):  # noqa: B007
        chosen = [rows[0], rows[len(rows) // 2], rows[-1]]
        for row, alpha in zip(chosen, (0.3, 0.6, 1.0)):
            for model in ("step", "chunk"):
                values = row[f"horizon_{model}"]
                axis.plot(
                    range(len(values)), values, color=COLOURS[model], alpha=alpha,
                    label=f"{model} model, N = {row['episodes']}",
                )  # fmt: skip
        axis.set_xlabel("chunks imagined")
        axis.set_ylim(bottom=0)
    figure.axes[0].set_ylabel("total variation to the true state")
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def learned_best_n(results: dict) -> Figure:
    """The best branch length against the number of episodes."""
    lines = (
        ("exact", "exact, chunk model", "-", COLOURS["exact"]),
        ("exact_step_model", "exact, step model", "-", COLOURS["step"]),
        ("published", "published bound", "--", COLOURS["published"]),
        ("corrected", "corrected bound", "--", COLOURS["corrected"]),
        ("saturating", "saturating bound", ":", COLOURS["saturating"]),
    )
    for figure, axis, _, rows in _settings(results):  # noqa: B007
        for key, name, style, colour in lines:
            axis.plot(
                [row["episodes"] for row in rows], [row["optimal_n"][key] for row in rows], style,
                marker="o", markersize=4, color=colour, label=name,
            )  # fmt: skip
        axis.set_xscale("log")
        axis.set_xlabel("episodes N")
    figure.axes[0].set_ylabel("n*")
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    return figure
