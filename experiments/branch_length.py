"""How long should a branch be? The same policy optimised on branches of several lengths
(arXiv 2603.20607, table 3).

    python -m experiments.branch_length
    python -m experiments.branch_length --chunks=1,2,4,full --seeds=0,1,2 --workdir=DIR
    python -m experiments.branch_length --config.rl.method=ppo --seeds=0

Per seed, demonstrations, fine-tuned policy, rollouts, world model and value are made once; then for
each length policy optimisation, by whichever `rl.method`, and evaluation, with as many imagined
chunks for each. `full` begins at the episodes' starts and goes on to the end. Started again, the
command continues. Writes `branch_length.json` and `branch_length.png`: success against length,
pooled over seeds, and below it how the error of the world model grows, with the length that the
theory recommends.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import ml_collections
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from experiments.libero_long import CONFIG_DIRECTORY, one_message, parse_flags
from experiments.shared_stages import continued, optimize_each, require_simulator


def with_branches(config: ml_collections.ConfigDict, length: str) -> ml_collections.ConfigDict:
    """The config with branches of that length, and as many imagined chunks as before.

    Raises:
        ValueError: no branch length.
    """
    config = ml_collections.ConfigDict(config.to_dict())
    rl, full = config.rl, config.max_steps // config.chunk
    if length == "full":
        rl.start_states_from, chunks = "episode_start", full
    elif length.isdigit() and 0 < int(length) <= full:
        chunks = int(length)
    else:
        raise ValueError(f"--chunks holds {length!r}: branches have 1 to {full} chunks, or 'full'")
    if rl.method == "ranked":
        starts = rl.ranked.start_states * rl.ranked.chunks // chunks
        rl.ranked.update({"chunks": chunks, "start_states": max(1, starts)})
        return config.lock()
    starts = rl.start_states * rl.branch_chunks // chunks
    rl.branch_chunks = chunks
    rl.start_states = max(1, starts // rl.group_size) * rl.group_size
    rl.imagination_batch = math.gcd(rl.imagination_batch, rl.start_states)
    rl.minibatch_size = min(rl.minibatch_size, rl.start_states * rl.branch_chunks)
    return config.lock()


def run(
    config: ml_collections.ConfigDict, root: Path, lengths: Sequence[str], seeds: Sequence[int]
) -> dict:
    """All runs; returns "lengths", length -> pooled successes, and "world_models", their error
    curves."""
    from mbpo_jax.stages.limits import check_config

    require_simulator(config)
    check_config(config)
    for length in lengths:
        with_branches(config, length)
    root.mkdir(parents=True, exist_ok=True)
    evaluated: dict[str, list[dict]] = {length: [] for length in lengths}
    curves = []
    for seed in seeds:
        seeded = ml_collections.ConfigDict(config.to_dict() | {"seed": seed}).lock()
        variants = {length: with_branches(seeded, length) for length in lengths}
        world_model, evaluations = optimize_each(root / f"seed{seed}", seeded, variants)
        curves.append(world_model["horizon"])
        for length, summary in evaluations.items():
            evaluated[length].append(summary)
    return {"lengths": {n: pooled(parts) for n, parts in evaluated.items()}, "curves": curves}


def pooled(parts: Sequence[Mapping]) -> dict:
    """Successes of the fine-tuned and the improved policy over the evaluations of several seeds,
    random resets where there are any, and their paired comparison."""
    from mbpo_jax.stages.statistics import mcnemar_exact, wilson_interval

    resets = all("resets" in part for part in parts)
    kind, pairs = ("resets", "paired_resets") if resets else ("policies", "paired")
    found: dict = {"starts": kind}
    for name in ("sft", "improved"):
        successes = sum(part[kind][name]["successes"] for part in parts)
        episodes = sum(part[kind][name]["episodes"] for part in parts)
        found[name] = {
            "successes": successes,
            "episodes": episodes,
            "interval": wilson_interval(successes, episodes),
        }
    only = [
        sum(part[pairs]["improved"][side] for part in parts)
        for side in ("first_only", "second_only")
    ]
    return found | {"first_only": only[0], "second_only": only[1], "p_value": mcnemar_exact(*only)}


def recommended(config: ml_collections.ConfigDict, curves: Sequence[Mapping]) -> dict[str, int]:
    """The length of the smallest bound (`theory.branch_length`) for several divergences ε_π of the
    improved policy from the data's. The world model's chunk error ε_m(j) is taken to be the share
    of the change that it does not explain, in the worst view; after the last measured chunk it
    stays as it is."""
    from experiments.theory.branch_length import optimal_branch_length

    full = config.max_steps // config.chunk
    views = [curve[camera]["unexplained"] for curve in curves for camera in config.cameras]
    error = np.clip(np.max(views, axis=0), 0, 1)
    error = np.concatenate([error, np.full(full, error[-1])])[:full]
    return {
        f"{eps:g}": optimal_branch_length(eps, error, config.rl.discount, config.chunk)
        for eps in (0.1, 0.2, 0.3, 0.5)
    }


def draw(results: Mapping, cameras: Sequence[str], path: Path) -> None:
    """Success against branch length over the open-loop error of the world model."""
    from mbpo_jax.reporting.figures import COLORS, POLICY_COLORS, plt

    lengths = results["lengths"]
    figure, (above, below) = plt.subplots(2, 1, figsize=(5.4, 5.2))
    for name, shift in (("sft", -0.08), ("improved", 0.08)):
        parts = [row[name] for row in lengths.values()]
        rates = np.array([part["successes"] / part["episodes"] for part in parts])
        ends = np.array([part["interval"] for part in parts])
        above.errorbar(
            np.arange(len(parts)) + shift,
            rates,
            np.abs(ends.T - rates),
            fmt="o",
            capsize=3,
            color=POLICY_COLORS[name],
            label="fine-tuned" if name == "sft" else name,
        )
    above.set_xticks(range(len(lengths)), lengths)
    above.set_xlabel("chunks in a branch")
    above.set_ylabel("success rate (95 % Wilson)")
    above.set_ylim(0, 1)
    above.legend(fontsize=7)
    for color, camera in zip(COLORS, cameras):
        curve = np.array([curve[camera]["unexplained"] for curve in results["curves"]])
        chunks = np.arange(1, curve.shape[1] + 1)
        below.plot(chunks, curve.mean(0), "o-", color=color, label=camera)
        below.fill_between(chunks, curve.min(0), curve.max(0), color=color, alpha=0.15, lw=0)
    measured = len(curve[0])
    for row, (eps, n) in enumerate(results["recommended"].items()):
        place = min(n, measured + 0.5)
        below.axvline(place, ls=":", lw=1, color=COLORS[5])
        height = below.get_xaxis_transform()  # x in chunks, y as a part of the axis
        below.text(
            place + 0.03, 0.05 + 0.09 * row, f"ε = {eps}: n = {n}", fontsize=7, transform=height
        )
    below.set_xticks(chunks)
    below.set_xlim(0.8, measured + 1.3)
    below.set_ylim(0, None)
    below.set_xlabel("chunks imagined; dotted: recommended for a divergence ε of the policies")
    below.set_ylabel("unexplained change")
    below.legend(fontsize=7, loc="lower center")
    figure.savefig(path)
    plt.close(figure)


def table(results: Mapping) -> str:
    lines = [f"{'chunks':<8}{'fine-tuned':>14}{'improved':>14}{'alone':>12}{'p':>9}"]
    for length, row in results["lengths"].items():
        rates = [
            f"{row[name]['successes']}/{row[name]['episodes']}" for name in ("sft", "improved")
        ]
        alone = f"{row['first_only']} v {row['second_only']}"
        lines.append(f"{length:<8}{rates[0]:>14}{rates[1]:>14}{alone:>12}{row['p_value']:>9.3g}")
    return "\n".join(lines)


def main() -> None:
    with one_message():
        config = config_flags.DEFINE_config_file(
            "config",
            f"{CONFIG_DIRECTORY}/libero_long.py:micro",
            "configs/SUITE.py:VARIANT; any entry can be overridden",
        )
        workdir = flags.DEFINE_string("workdir", "runs/branch_length", "where all is written")
        chunks = flags.DEFINE_list(
            "chunks", ["1", "2", "4", "full"], "branch lengths n in chunks, or full"
        )
        seeds = flags.DEFINE_list("seeds", ["0", "1", "2"], "seeds of whole runs")
    app.run(
        lambda _: compare(config.value, Path(workdir.value), chunks.value, seeds.value),
        flags_parser=parse_flags,
    )


def compare(
    config: ml_collections.ConfigDict, root: Path, lengths: Sequence[str], seeds: Sequence[str]
) -> None:
    """`run`, then the table and the picture."""
    with continued(root):
        results = run(config, root, lengths, [int(seed) for seed in seeds])
        results["recommended"] = recommended(config, results["curves"])
        (root / "branch_length.json").write_text(json.dumps(results, indent=1))
        draw(results, config.cameras, root / "branch_length.png")
        print(table(results))
        print(root / "branch_length.png")


if __name__ == "__main__":
    main()
