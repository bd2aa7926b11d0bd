"""Stage `report`: one HTML file, `results.json` and TensorBoard scalars of what was found."""

import json
from collections.abc import Sequence

from mbpo_jax.reporting import sections
from mbpo_jax.reporting.fidelity_report import f1_text
from mbpo_jax.reporting.page import Section, Table, render
from mbpo_jax.reporting.sections import evaluated_starts, imagined_change, rate_text
from mbpo_jax.stages.build import Config
from mbpo_jax.stages.workspace import Workspace
from mbpo_jax.training.metrics import MetricWriter

SECTIONS = {  # in the page's order
    "evaluate": sections.evaluation_section,
    "imagine": sections.imagined_section,
    "demonstrations": sections.data_section,
    "sft": sections.sft_section,
    "world_model": sections.world_model_section,
    "selection": sections.selection_section,
    "improve": sections.improve_section,
}


def write_report(workspace: Workspace, stages: Sequence[str]) -> str:
    """Writes `report.html`, `results.json` and TensorBoard scalars of the finished stages.

    Returns:
        the closing text for the terminal: a table of the results and the report's path.
    """
    config = workspace.config
    summaries = {s: workspace.summary(s) for s in stages}
    summaries = {s: v for s, v in summaries.items() if v is not None}
    if not summaries:
        return "no stage has finished yet; there is nothing to report"
    results = {"config": json.loads(config.to_json_best_effort()), "stages": summaries}
    (workspace.root / "results.json").write_text(json.dumps(results, indent=1))
    with MetricWriter(workspace.root / "report", loggers=config.loggers) as writer:
        writer.write(0, dict(_numbers("", summaries)))
    found = [build(workspace, summaries) for s, build in SECTIONS.items() if s in summaries]
    if "world_model" in summaries:
        found.append(sections.gates_section(summaries))
    found.append(_run_section(summaries))
    html = render(
        title=_title(config),
        subtitle=_subtitle(config),
        verdict=_verdict(summaries),
        sections=found,
        config=json.dumps(results["config"], indent=1),
    )
    path = workspace.root / "report.html"
    path.write_text(html, encoding="utf-8")
    return f"\n{_terminal_table(summaries)}\n{_verdict(summaries)}\nreport: {path}"


def _numbers(prefix: str, tree):
    for key, value in tree.items():
        name = f"{prefix}/{key}" if prefix else key
        if isinstance(value, dict):
            yield from _numbers(name, value)
        elif isinstance(value, list) and all(isinstance(v, int | float) for v in value):
            yield from ((f"{name}/{i}", v) for i, v in enumerate(value))
        elif isinstance(value, int | float):
            yield name, value


def _title(config: Config) -> str:
    if not config.tasks:
        return f"VLA-MBPO on {config.suite}, from recorded episodes"
    tasks = ", ".join(map(str, config.tasks))
    return f"VLA-MBPO on {config.suite}, task{'s' if len(config.tasks) > 1 else ''} {tasks}"


def _subtitle(config: Config) -> str:
    rl = config.rl
    if rl.method == "ranked":
        return (
            f"seed {config.seed}; imitates the best {rl.ranked.kept} of {rl.group_size} imagined "
            f"branches of {rl.ranked.chunks} × {config.chunk} steps"
        )
    return (
        f"seed {config.seed}; PPO on branches of {rl.branch_chunks} × {config.chunk} steps; "
        f"{rl.flow.method} log-probabilities"
    )


def _verdict(summaries: dict) -> str:
    if "imagine" in summaries:
        results, paired = summaries["imagine"]["policies"], summaries["imagine"]["paired"]
        return (
            "Success on the robot was not measured. Inside the world model, from held-out states, "
            f"the fine-tuned policy succeeds in {rate_text(results['sft'])} of branches, the "
            f"improved one in {rate_text(results['improved'])} (exact McNemar p = "
            f"{paired['p_value']:.3g})."
        )
    if "evaluate" not in summaries:
        return "The policies have not been evaluated yet."
    return " ".join(
        _comparison(starts, summaries["evaluate"][key], summaries["evaluate"][paired]["improved"])
        for starts, key, paired in evaluated_starts(summaries["evaluate"])
    )


def _comparison(starts: str, results: dict, paired: dict) -> str:
    sft, improved = results["sft"], results["improved"]
    difference = 100 * (improved["success_rate"] - sft["success_rate"])
    significant = "" if paired["p_value"] < 0.05 else "not "
    return (
        f"From {starts}: fine-tuned policy {rate_text(sft)}, improved policy "
        f"{rate_text(improved)}: a difference of {difference:+.1f} points; of the same "
        f"{paired['pairs']} starts the improved policy alone solved {paired['second_only']}, the "
        f"fine-tuned one alone {paired['first_only']} (exact McNemar p = {paired['p_value']:.3g}, "
        f"{significant}significant at 5 %)."
    )


def _terminal_table(summaries: dict) -> str:
    lines = [f"{'stage':<16}{'minutes':>9}  result"]
    for stage, summary in summaries.items():
        lines.append(f"{stage:<16}{summary['minutes']:>9.1f}  {_one_line(stage, summary)}")
    minutes = sum(s["minutes"] for s in summaries.values())
    return "\n".join([*lines, f"{'total':<16}{minutes:>9.1f}"])


def _one_line(stage: str, s: dict) -> str:
    if stage == "demonstrations" and "source" in s:
        return f"{s['episodes']} of {s['attempts']} episodes imported from {s['source']}"
    if stage == "demonstrations":
        return f"{s['episodes']} successes of {s['attempts']} scripted episodes"
    if stage == "sft":
        return f"{s['steps']} steps on {s['frames']} frames"
    if stage == "rollouts":
        return f"{s['successes']}/{s['episodes']} successes"
    if stage == "world_model":
        views = ", ".join(
            f"{c} {v['psnr']:.1f} dB (copy {v['copy_psnr']:.1f})" for c, v in s["fidelity"].items()
        )
        return f"{views}; reward F1 {f1_text(s['reward'])}"
    if stage == "value" and s["steps"]:
        held_out = s["held_out"].items()
        return ", ".join(f"AUC {q['auc']:.2f} ({kind} frames)" for kind, q in held_out)
    if stage == "value":
        return "starts fresh"
    if stage == "selection":
        return "; ".join(f"{name} {rate_text(p)}" for name, p in s["resets"].items())
    if stage == "siblings":
        known = ", ".join(f"{x['correlation']:.2f}" for x in s["imagined"])
        return (
            f"success of chunks from one state: repeats by {s['repeatable']['correlation']:.2f}; "
            f"known to imagination after 1, 2, … chunks by {known}, "
            f"to the value of the real next state by {s['real']['correlation']:.2f}"
        )
    if stage == "improve":
        return f"{imagined_change(s)} in {s['updates']} updates"
    if stage == "imagine":
        return "; ".join(f"{k} {rate_text(p)}" for k, p in s["policies"].items()) + ", all imagined"
    return "; ".join(
        f"{name}, {starts} {rate_text(policy)}"
        for starts, key, _ in evaluated_starts(s)
        for name, policy in s[key].items()
    )


def _run_section(summaries: dict) -> Section:
    rows = [(s, f"{v['minutes']:.1f}", _one_line(s, v)) for s, v in summaries.items()]
    environment = next(iter(summaries.values()))["environment"]
    versions = ", ".join(f"{k} {v}" for k, v in environment["versions"].items())
    text = (
        f"{environment['processor']}; JAX devices: {environment['devices']}; Python "
        f"{environment['python']} on {environment['platform']}; {versions}."
    )
    return Section("What was run", text, [Table(("stage", "minutes", "result"), rows)])
