"""Is one set of hyperparameters enough? Policy optimisation with each main entry of the `rl`
section at a third and at three times its value (arXiv 2603.20607, table 5).

    python -m experiments.stability
    python -m experiments.stability --tasks=5,2 --entries=ranked.steps,ranked.kept --workdir=DIR
    python -m experiments.stability --config.rl.method=ppo --entries=actor_lr,flow.noise_std
    python -m experiments.stability --config=configs/libero_goal.py:micro --tasks=0,2

Per task, demonstrations, fine-tuned policy, rollouts, world model and value are made once; then
policy optimisation and evaluation for the config's own values and for each changed one. Whole
numbers are rounded; branches of another length imagine as many chunks. Started again, the command
continues, and entries may be added. Writes `stability.json` and `stability.html`: success against
each entry, and where another value is better than the shared one (exact McNemar test, p < 0.05).
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_collections
from absl import app, flags
from ml_collections import config_flags

from experiments.branch_length import with_branches
from experiments.libero_long import CONFIG_DIRECTORY, one_message, parse_flags
from experiments.shared_stages import continued, optimize_each, require_simulator

ENTRIES = {  # of each rl.method
    "ppo": (
        "actor_lr",
        "critic_lr",
        "clip_ratio",
        "anchor_weight",
        "flow.noise_std",
        "updates",
        "branch_chunks",
    ),
    "ranked": (
        "ranked.learning_rate",
        "ranked.matrix_learning_rate",
        "ranked.steps",
        "ranked.start_states",
        "ranked.kept",
        "ranked.chunks",
    ),
}
FACTORS = {"third": 1 / 3, "triple": 3.0}
SHARED = "shared"


def entries_of(config: ml_collections.ConfigDict, names: Sequence[str]) -> list[str]:
    """The named entries of `config.rl`; by default those of `ENTRIES` that are not 0.

    Raises:
        ValueError: an entry that is not there, is no number, is 0 and so has no multiples, or is
            read by another `rl.method` alone.
    """
    own = ENTRIES[config.rl.method]
    others = {name for entries in ENTRIES.values() for name in entries} - {*own}
    found = []
    for name in names or own:
        value = config.rl.to_dict()
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if name in others:
            problem = f"rl.method={config.rl.method!r} does not read it"
        elif not number:
            problem = "rl has no such number"
        elif not value:
            problem = "it is 0, as are its multiples"
        else:
            found.append(name)
            continue
        if names:
            raise ValueError(f"--entries holds {name!r}: {problem}; there are {', '.join(own)}")
    return found


def scaled(
    config: ml_collections.ConfigDict, entry: str, factor: float
) -> ml_collections.ConfigDict:
    """The config with `rl.ENTRY` times a factor; a whole number is rounded, at least 1.

    Raises:
        ValueError: the config cannot be used so.
    """
    from mbpo_jax.stages.limits import check_config

    value = config.rl
    for part in entry.split("."):
        value = value[part]
    value = max(1, round(value * factor)) if isinstance(value, int) else value * factor
    if entry in ("branch_chunks", "ranked.chunks"):
        own = with_branches(config, str(min(value, config.max_steps // config.chunk)))
    else:
        own = ml_collections.ConfigDict(config.to_dict())
        own.update_from_flattened_dict({f"rl.{entry}": value})
    check_config(own)
    return own.lock()


def variants(
    config: ml_collections.ConfigDict, entries: Sequence[str]
) -> dict[str, ml_collections.ConfigDict]:
    """Name of a run -> its config: the shared values, then "ENTRY_third" and "ENTRY_triple"."""
    changed = {
        f"{entry}_{name}": scaled(config, entry, factor)
        for entry in entries
        for name, factor in FACTORS.items()
    }
    return {SHARED: config, **changed}


def run(
    config: ml_collections.ConfigDict, root: Path, tasks: Sequence[int], entries: Sequence[str]
) -> dict:
    """All runs: task -> name of a run (`variants`) -> "sft" and "improved" (`success_rate`), and
    "against_shared", the paired comparison with the shared values."""
    from mbpo_jax.stages.statistics import paired_comparison
    from mbpo_jax.training.metrics import read_metrics

    resets = config.evaluation.resets_per_task > 0
    kind = "resets" if resets else "policies"
    configs = {
        task: ml_collections.ConfigDict(config.to_dict() | {"tasks": (task,)}).lock()
        for task in tasks
    }
    wanted = {task: variants(own, entries) for task, own in configs.items()}
    root.mkdir(parents=True, exist_ok=True)
    results: dict = {}
    for task, own in configs.items():
        base = root / f"task{task}"
        _, evaluations = optimize_each(base, own, wanted[task])

        def episodes(name, base=base):
            path = base.with_name(f"{base.name}_{name}") / "evaluate" / "episodes_improved.jsonl"
            return [e for e in read_metrics(path) if (e["init_state"] < 0) == resets]

        results[str(task)] = {
            name: {
                "sft": summary[kind]["sft"],
                "improved": summary[kind]["improved"],
                "against_shared": paired_comparison(episodes(SHARED), episodes(name)),
            }
            for name, summary in evaluations.items()
        }
    return results


def better_than_shared(results: Mapping, entries: Sequence[str]) -> list[tuple[str, ...]]:
    """Rows (task, entry, factor, successes, with the shared value, p) where a changed value is
    better with p < 0.05."""
    rows = []
    for task, runs in results.items():
        shared = runs[SHARED]["improved"]
        for entry in entries:
            for name in FACTORS:
                one = runs[f"{entry}_{name}"]
                pair = one["against_shared"]
                if pair["second_only"] > pair["first_only"] and pair["p_value"] < 0.05:
                    row = [
                        f"{part['successes']}/{part['episodes']}"
                        for part in (one["improved"], shared)
                    ]
                    rows.append((task, entry, name, *row, f"{pair['p_value']:.2g}"))
    return rows


def draw(results: Mapping, entries: Sequence[str]):
    """Success of the improved policy against each entry's factor, a line for each task; dotted: the
    fine-tuned policy."""
    import numpy as np

    from mbpo_jax.reporting.figures import COLORS, plt

    columns = min(4, len(entries))
    rows = -(-len(entries) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.5 * columns + 0.6, 2.3 * rows), squeeze=False, sharey=True
    )
    for axis in axes.flat[len(entries) :]:
        axis.axis("off")
    for axis, entry in zip(axes.flat, entries):
        shifts = np.linspace(-0.15, 0.15, len(results))
        for color, shift, (task, runs) in zip(itertools.cycle(COLORS), shifts, results.items()):
            parts = [
                runs[name]["improved"] for name in (f"{entry}_third", SHARED, f"{entry}_triple")
            ]
            rates = np.array([part["success_rate"] for part in parts])
            ends = np.array([part["interval"] for part in parts])
            x = np.arange(3) + shift
            axis.errorbar(
                x,
                rates,
                np.abs(ends.T - rates),
                fmt="o-",
                ms=4,
                capsize=3,
                color=color,
                label=f"task {task}",
            )
            axis.axhline(runs[SHARED]["sft"]["success_rate"], ls=":", lw=1, color=color)
        axis.set_xticks(range(3), ["× ⅓", "shared", "× 3"])
        axis.set_title(entry, fontsize=9)
        axis.set_ylim(0, 1)
    axes[0, 0].set_ylabel("success rate (95 % Wilson)")
    axes[0, 0].legend(fontsize=7)
    return figure


def page(config: ml_collections.ConfigDict, results: Mapping, entries: Sequence[str]) -> str:
    """The HTML page."""
    from mbpo_jax.reporting.page import Section, Table, png, render

    def success(part):
        low, high = part["interval"]
        return f"{part['successes']}/{part['episodes']} ({100 * low:.0f}–{100 * high:.0f})"

    rows = [
        (task, name, success(one["improved"]), success(one["sft"]),
         f"{one['against_shared']['second_only']} v {one['against_shared']['first_only']}",
         f"{one['against_shared']['p_value']:.2g}")
        for task, runs in results.items()
        for name, one in runs.items()
    ]  # fmt: skip
    better = better_than_shared(results, entries)
    header = ("task", "values", "improved", "fine-tuned", "better v worse than shared", "p")
    sections = [
        Section(
            "Success against each entry",
            images=[png(draw(results, entries), "dotted: the fine-tuned policy")],
        ),
        Section("All runs", tables=[Table(header, rows)]),
    ]
    if better:
        header = ("task", "entry", "factor", "success", "with the shared value", "p")
        sections.insert(1, Section("Where the shared set fails", tables=[Table(header, better)]))
    return render(
        title="Stability of the hyperparameters",
        subtitle=f"{config.suite}, tasks {', '.join(results)}",
        verdict=f"Another value is better with p < 0.05 in {len(better)} of "
        f"{len(results) * len(entries) * len(FACTORS)} cases; by chance one expects 2.5 % of them.",
        sections=sections,
        config=str(config.rl),
    )


def main() -> None:
    with one_message():
        config = config_flags.DEFINE_config_file(
            "config",
            f"{CONFIG_DIRECTORY}/libero_long.py:micro",
            "configs/SUITE.py:VARIANT; any entry can be overridden",
        )
        workdir = flags.DEFINE_string("workdir", "runs/stability", "where all is written")
        tasks = flags.DEFINE_list("tasks", ["5", "2"], "tasks of the suite, each a run of its own")
        entries = flags.DEFINE_list(
            "entries", [], "entries of rl; by default the main ones of rl.method that are not 0"
        )
    app.run(
        lambda _: measure(config.value, Path(workdir.value), tasks.value, entries.value),
        flags_parser=parse_flags,
    )


def measure(
    config: ml_collections.ConfigDict, root: Path, tasks: Sequence[str], names: Sequence[str]
) -> None:
    """`run`, then the page.

    Raises:
        SystemExit: with one message, for what the user can mend.
    """
    from mbpo_jax.stages.limits import check_config

    with continued(root):
        require_simulator(config)
        check_config(config)
        entries = entries_of(config, names)
        if len(set(tasks)) < len(tasks) or not all(task.isdecimal() for task in tasks):
            raise ValueError(f"--tasks={','.join(tasks)}: give numbers of tasks, each once")
        results = run(config, root, [int(task) for task in tasks], entries)
        (root / "stability.json").write_text(json.dumps(results, indent=1))
        (root / "stability.html").write_text(page(config, results, entries))
        print(root / "stability.html")


if __name__ == "__main__":
    main()
