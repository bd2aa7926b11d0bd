"""The table of a comparison: success with intervals, paired tests, and what each method cost."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from experiments.compare import DESCRIPTIONS
from experiments.compare.methods import Method
from mbpo_jax.reporting.figures import COLORS, plt
from mbpo_jax.reporting.page import Section, Table, png, render
from mbpo_jax.stages.build import Config
from mbpo_jax.stages.statistics import mcnemar_exact, paired_comparison, wilson_interval
from mbpo_jax.stages.workspace import Workspace
from mbpo_jax.training.metrics import read_metrics

STARTS = {"resets": "random resets", "init_states": "shipped init states"}


def collect(
    config: Config, root: Path, methods: Mapping[str, Method], seeds: Sequence[int]
) -> dict:
    """What is known of the seeds that every method has finished: "seeds" and "methods", name ->
    "resets" and "init_states" (`pooled`), "real_episodes", "imagined_chunks", "minutes", and
    "against", each method before it -> the starts of both kinds from which only the one or the
    other succeeded (`paired`)."""

    def place(seed, name):
        return root / f"seed{seed}_{name}"

    finished = [
        seed
        for seed in seeds
        if all((place(seed, name) / "evaluate/done.json").exists() for name in methods)
    ]
    episodes = {
        name: [
            read_metrics(place(seed, name) / "evaluate" / f"episodes_{name}.jsonl")
            for seed in finished
        ]
        for name in methods
    }
    rows = {}
    for name, method in methods.items():
        own = method.config(config)
        mine = [Workspace(place(seed, name), own) for seed in finished]
        rows[name] = {
            "description": DESCRIPTIONS[name],
            "real_episodes": method.episodes(own),
            "imagined_chunks": [
                imagined_chunks(name, own, w, e) for w, e in zip(mine, episodes[name])
            ],
            "minutes": [minutes(method, w) for w in mine],
        }
        for kind in STARTS if finished else ():
            rows[name][kind] = pooled(episodes["sft"], episodes[name], kind)
        rows[name]["against"] = {
            other: paired(episodes[other], episodes[name]) for other in rows if other != name
        }
    return {"seeds": finished, "methods": rows}


def pooled(first: Sequence[list[dict]], second: Sequence[list[dict]], kind: str) -> dict | None:
    """Successes of `second` (episodes of each seed) from the starts of a kind, with their Wilson
    interval, and its paired comparison with `first` over all seeds; None without such episodes."""

    def starts(episodes):
        return [e for e in episodes if (e["init_state"] < 0) == (kind == "resets")]

    mine = [e for episodes in second for e in starts(episodes)]
    if not mine:
        return None
    pairs = [paired_comparison(starts(a), starts(b)) for a, b in zip(first, second)]
    total = {
        key: sum(pair[key] for pair in pairs) for key in ("pairs", "first_only", "second_only")
    }
    successes = sum(e["success"] for e in mine)
    return {
        "successes": successes,
        "episodes": len(mine),
        "interval": list(wilson_interval(successes, len(mine))),
        "pairs": total["pairs"],
        "sft_only": total["first_only"],
        "method_only": total["second_only"],
        "p_value": mcnemar_exact(total["first_only"], total["second_only"]),
    }


def paired(first: Sequence[list[dict]], second: Sequence[list[dict]]) -> dict:
    """How many of all starts only the first or only the second solves (episodes of each seed), and
    the exact McNemar test's p."""
    pairs = [paired_comparison(a, b) for a, b in zip(first, second)]
    only = [sum(pair[side] for pair in pairs) for side in ("first_only", "second_only")]
    return {"other_only": only[0], "it_only": only[1], "p_value": mcnemar_exact(*only)}


def imagined_chunks(
    name: str, config: Config, workspace: Workspace, episodes: Sequence[dict]
) -> int:
    """Chunks that the world model predicted for one seed, in training and while acting."""
    count = 0
    if config.rl.world != "simulator":
        count = (workspace.summary("improve") or {}).get("imagined_chunks", 0)
    if name.endswith("best_of_n"):
        acted = sum(math.ceil(e["length"] / config.chunk) for e in episodes)
        count += acted * config.evaluation.best_of * config.evaluation.best_of_chunks
    return count


def minutes(method: Method, workspace: Workspace) -> dict[str, float]:
    """Of one seed: in the "shared" stages that the method needs, its own "training", and the
    "evaluation"."""

    def of(stage):
        return (workspace.summary(stage) or {}).get("minutes", 0.0)

    return {
        "shared": sum(of(stage) for stage in method.shared),
        "training": of("improve"),
        "evaluation": of("evaluate"),
    }


def table(results: Mapping) -> Table:
    """One row for each method; costs are means over the seeds."""
    header = ["method"]
    for title in STARTS.values():
        header += [f"success, {title}", "SFT only / it only", "p"]
    header += ["real episodes", "imagined chunks", "training, min", "shared stages, min"]
    rows = []
    for name, row in results["methods"].items():
        cells = [name]
        for kind in STARTS:
            cells += _success(name, row[kind]) if row.get(kind) else ["", "", ""]
        cells += [str(row["real_episodes"]), f"{np.mean(row['imagined_chunks']):.0f}"]
        cells += [
            f"{np.mean([part[kind] for part in row['minutes']]):.1f}"
            for kind in ("training", "shared")
        ]
        rows.append(cells)
    return Table(header, rows)


def between(results: Mapping) -> Table:
    """Methods against those before them, over all starts."""
    methods = results["methods"]
    names = list(methods)
    rows = []
    for name, row in list(methods.items())[1:]:
        cells = [
            f"{x['other_only']} / {x['it_only']}, p = {x['p_value']:.2g}"
            for x in row["against"].values()
        ]
        rows.append([name, *cells, *[""] * (len(names) - 1 - len(cells))])
    return Table(["column only / row only", *names[:-1]], rows)


def _success(name: str, part: Mapping) -> list[str]:
    low, high = part["interval"]
    rate = f"{part['successes']}/{part['episodes']} ({100 * low:.0f}–{100 * high:.0f} %)"
    if name == "sft":
        return [rate, "", ""]
    return [rate, f"{part['sft_only']} / {part['method_only']}", f"{part['p_value']:.2g}"]


def draw(results: Mapping):
    """Success rates with their intervals, a line for each method."""
    names = list(results["methods"])
    figure, axis = plt.subplots(figsize=(6.4, 0.9 + 0.34 * len(names)))
    for shift, color, (kind, title) in zip((-0.12, 0.12), COLORS, STARTS.items()):
        known = [(i, results["methods"][n][kind]) for i, n in enumerate(names)]
        known = [(i, part) for i, part in known if part]
        if not known:
            continue
        rates = np.array([part["successes"] / part["episodes"] for _, part in known])
        ends = np.array([part["interval"] for _, part in known])
        places = np.array([i for i, _ in known]) + shift
        axis.errorbar(
            rates, places, xerr=np.abs(ends.T - rates), fmt="o", capsize=3, color=color, label=title
        )
        axis.axvline(rates[0], color=color, lw=0.8, ls=":")  # sft is the first
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlim(-0.02, 1.02)
    axis.set_xlabel("success rate (95 % Wilson); dotted: the fine-tuned policy")
    axis.legend(fontsize=7)
    return figure


def page(config: Config, results: Mapping, budget: int) -> str:
    """The comparison as one HTML file without outside parts."""
    seeds = ", ".join(map(str, results["seeds"]))
    explained = Table(
        ["method", "what it is"], [[n, d["description"]] for n, d in results["methods"].items()]
    )
    success = Section(
        "Success",
        text="“SFT only” are starts from which only the fine-tuned policy succeeded, “it only” "
        "those from which only the method did; p is of the exact McNemar test on these, pooled "
        "over seeds. Costs are means over the seeds. Chunks that best_of_n imagines while acting "
        "count. Shared stages are counted once for every method that needs them.",
        tables=[table(results)],
        images=[png(draw(results), "success with 95 % intervals")],
    )
    pairs = Section(
        "Method against method",
        text="Starts of both kinds from which only the method of the column, or only that of the "
        "row succeeded, with the exact McNemar test, pooled over seeds. These tests are many: the "
        "smallest p among them is smaller than it looks.",
        tables=[between(results)],
    )
    return render(
        title="Methods compared",
        subtitle=f"{config.suite}, tasks {', '.join(map(str, config.tasks))}; seeds {seeds}",
        verdict=f"Every method had {budget} real episodes beside the demonstrations, where its row "
        "does not say otherwise.",
        sections=[success, pairs, Section("Methods", tables=[explained])],
        config=str(config),
    )


def plain(table: Table) -> str:
    """The table for a terminal."""
    rows = [table.header, *table.rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(table.header))]
    return "\n".join("  ".join(x.ljust(w) for x, w in zip(row, widths)).rstrip() for row in rows)
