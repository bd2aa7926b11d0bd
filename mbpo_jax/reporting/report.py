"""Stage `report`: one HTML file, `results.json` and TensorBoard scalars of what was found."""

import base64
import json
from collections.abc import Sequence

import numpy as np

from mbpo_jax.reporting import diagnose, figures
from mbpo_jax.reporting.fidelity_report import f1_text
from mbpo_jax.reporting.page import Image, Section, Table, png, render
from mbpo_jax.stages.build import Config
from mbpo_jax.stages.workspace import Workspace
from mbpo_jax.training.metrics import MetricWriter, read_metrics


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
    builders = {
        "demonstrations": _data_section,
        "sft": _sft_section,
        "world_model": _world_model_section,
        "improve": _improve_section,
    }
    sections = [_evaluation_section(workspace, summaries)] if "evaluate" in summaries else []
    if "imagine" in summaries:
        sections.append(_imagined_section(summaries))
    sections += [build(workspace, summaries) for s, build in builders.items() if s in summaries]
    if "world_model" in summaries:
        sections.append(_gates_section(summaries))
    sections.append(_run_section(summaries))
    html = render(
        title=_title(config),
        subtitle=f"seed {config.seed}; branches of {config.rl.branch_chunks} chunks of "
        f"{config.chunk} steps; {config.rl.flow.method} log-probabilities",
        verdict=_verdict(summaries),
        sections=sections,
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


def _verdict(summaries: dict) -> str:
    if "imagine" in summaries:
        results, paired = summaries["imagine"]["policies"], summaries["imagine"]["paired"]
        return (
            "Success on the robot was not measured. Inside the world model, from held-out states, "
            f"the fine-tuned policy reaches success in {_rate(results['sft'])} of branches, the "
            f"improved one in {_rate(results['improved'])} (exact McNemar p = "
            f"{paired['p_value']:.3g})."
        )
    if "evaluate" not in summaries:
        return "The policies have not been evaluated yet."
    results, paired = summaries["evaluate"]["policies"], summaries["evaluate"]["paired"]["improved"]
    sft, improved = results["sft"], results["improved"]
    difference = 100 * (improved["success_rate"] - sft["success_rate"])
    significant = "" if paired["p_value"] < 0.05 else "not "
    return (
        f"Fine-tuned policy {_rate(sft)}, improved policy {_rate(improved)}: a difference of "
        f"{difference:+.1f} points; on the same {paired['pairs']} init states the improved policy "
        f"alone solved {paired['second_only']}, the fine-tuned one alone {paired['first_only']} "
        f"(exact McNemar p = {paired['p_value']:.3g}, {significant}significant at 5 %)."
    )


def _rate(part: dict) -> str:
    low, high = part["interval"]
    return (
        f"{100 * part['success_rate']:.1f} % ({part['successes']}/{part['episodes']}, 95 % Wilson "
        f"interval {100 * low:.1f}–{100 * high:.1f})"
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
        return "; ".join(f"{name} {_rate(p)}" for name, p in s["resets"].items())
    if stage == "siblings":
        known = ", ".join(f"{x['correlation']:.2f}" for x in s["imagined"])
        return (
            f"success of chunks from one state: repeats by {s['repeatable']['correlation']:.2f}; "
            f"known to imagination after 1, 2, … chunks by {known}, "
            f"to the value of the real next state by {s['real']['correlation']:.2f}"
        )
    if stage == "improve":
        return f"{_imagined_change(s)} in {s['updates']} updates"
    rates = "; ".join(f"{name} {_rate(p)}" for name, p in s["policies"].items())
    rates += "".join(f"; {name}, resets {_rate(p)}" for name, p in s.get("resets", {}).items())
    return f"{rates}, all imagined" if stage == "imagine" else rates


def _evaluation_section(workspace: Workspace, summaries: dict) -> Section:
    summary = summaries["evaluate"]
    policies = summary["policies"]
    instructions = {
        task: entry["instruction"] for task, entry in summaries["demonstrations"]["tasks"].items()
    }
    rows = []
    for name, result in policies.items():
        for task, part in result["tasks"].items():
            solved = part["mean_length_of_successes"]
            rows.append(
                (
                    f"{name}: {instructions[task]}",
                    _rate(part),
                    f"{100 * part['goal_fraction']:.0f} %",
                    f"{solved:.0f}" if solved else "–",
                    f"{part['seconds_per_episode']:.1f}",
                )
            )
    table = Table(
        ("policy: task", "success", "goal predicates", "steps when solved", "s per episode"), rows
    )
    columns = ("pairs", "both", "first_only", "second_only", "neither")
    pairs = Table(
        (
            "sft and",
            "starts",
            "pairs",
            "both",
            "only sft",
            "only it",
            "neither",
            "p (exact McNemar)",
        ),
        [
            [name, starts, *(str(paired[k]) for k in columns), f"{paired['p_value']:.3g}"]
            for starts, key in (("init states", "paired"), ("random resets", "paired_resets"))
            for name, paired in summary.get(key, {}).items()
        ],
    )
    for name, part in summary.get("resets", {}).items():
        rows.append((f"{name}: random resets", _rate(part), *[""] * 3))
    labels = {t: f"task {t}" for t in instructions}
    groups = {"shipped init states": policies}
    if len(labels) > 1:
        groups |= {
            label: {name: policies[name]["tasks"][task] for name in policies}
            for task, label in labels.items()
        }
    if summary.get("resets"):
        groups["random resets"] = summary["resets"]
    images = [png(figures.success_bars(groups), "success with 95 % Wilson intervals")]
    for kind, video in summary["videos"].items():
        data = (workspace.directory("evaluate") / video["file"]).read_bytes()
        caption = f"improved policy, {kind}: task {video['task']}, init state {video['init_state']}"
        images.append(Image(base64.b64encode(data).decode(), "gif", caption))
    text = (
        "Both policies started from the same fixed init states, which no earlier stage has seen: "
        "demonstrations and rollouts start from random resets. "
        f"{summary['worker_restarts']} simulator workers died or hung; their episodes were "
        "repeated."
    )
    return Section("Success in the simulator", text, [table, pairs], images)


def _imagined_section(summaries: dict) -> Section:
    s = summaries["imagine"]
    table = Table(("policy", "imagined success"), [(k, _rate(v)) for k, v in s["policies"].items()])
    text = (
        "Success on the robot was not measured: it takes the robot. These are the judgements of "
        f"the world model on its own images, over {s['start_states']} branches of {s['chunks']} "
        f"chunks from states of {s['held_out_episodes']} episodes that neither the world model nor "
        "policy optimisation has seen (supervised fine-tuning has seen the demonstrations among "
        "them). A policy that exploits the model's errors scores high here and fails on the robot."
    )
    return Section("Success in imagination, not on the robot", text, [table])


def _data_section(workspace: Workspace, summaries: dict) -> Section:
    parts = {s: summaries[s] for s in ("demonstrations", "rollouts") if s in summaries}
    fields = ("attempts", "episodes", "successes", "mean_length", "frames")
    rows = [
        (stage, s.get("source", "simulator"))
        + tuple(f"{s[field]:.0f}" if field in s else "–" for field in fields)
        for stage, s in parts.items()
    ]
    header = ("stage", "source", "tried", "kept", "successes", "mean steps", "frames")
    text = "Of demonstrations only successes are kept."
    restarts = [s["worker_restarts"] for s in parts.values() if "worker_restarts" in s]
    if restarts:
        text += f" {sum(restarts)} simulator workers died or hung; their episodes were repeated."
    return Section("Data", text, [Table(header, rows)])


def _sft_section(workspace: Workspace, summaries: dict) -> Section:
    records = read_metrics(workspace.directory("sft") / "metrics.jsonl")
    figure = figures.curves([("flow-matching loss", {"loss": _line(records, "loss")})])
    s = summaries["sft"]
    text = (
        f"{s['parameters'] / 1e6:.2f} M parameters, {s['steps']} steps; the loss went from "
        f"{records[0]['loss']:.3f} to {records[-1]['loss']:.3f}."
    )
    return Section("Supervised fine-tuning", text, images=[png(figure, "training loss")])


def _world_model_section(workspace: Workspace, summaries: dict) -> Section:
    directory, s = workspace.directory("world_model"), summaries["world_model"]
    dynamics = read_metrics(directory / "dynamics" / "metrics.jsonl")
    panels = [
        (
            "dynamics loss per view",
            {k.split("/", 1)[1]: _line(dynamics, k) for k in dynamics[0] if k.startswith("dyn")},
        ),
        ("reward cross-entropy", {"cross-entropy": _line(dynamics, "reward/ce")}),
    ]
    vae = read_metrics(directory / "vae" / "metrics.jsonl")
    if vae:
        panels.insert(0, ("autoencoder PSNR (dB)", {"psnr": _line(vae, "vae/psnr")}))
    images = [png(figures.curves(panels), "training of the world model")]
    rows = [
        (
            camera,
            f"{v['psnr']:.2f}",
            f"{v['copy_psnr']:.2f}",
            f"{v['ssim']:.3f}",
            f"{v['copy_ssim']:.3f}",
        )
        for camera, v in s["fidelity"].items()
    ]
    views = Table(("view", "PSNR (dB)", "copy-last-frame", "SSIM", "copy-last-frame"), rows)
    imagination = s["imagination"]
    gripper = imagination["gripper_cm"]
    follows = Table(
        ("view", "unexplained change", "response to the actions", "gripper read within (cm)"),
        [
            (
                camera,
                f"{v['unexplained']:.3f}",
                f"{v['response']:.3f}",
                f"{gripper[camera]['imagined']:.1f} (real frames {gripper[camera]['real']:.1f})",
            )
            for camera, v in imagination["views"].items()
        ],
    )
    r = s["reward"]
    reward = Table(
        ("reward, held-out frames", "accuracy", "precision", "recall", "F1 (95 % interval)"),
        [
            (
                f"{r['frames']} frames of {r['episodes']} episodes, {r['yes_frames']} done",
                *(f"{r[k]:.3f}" for k in ("accuracy", "precision", "recall")),
                f1_text(r),
            )
        ],
    )
    if "horizon" in s:
        lines = {
            camera: {"imagined": curve["psnr"], "copy of the start": curve["copy_psnr"]}
            for camera, curve in s["horizon"].items()
        }
        images.append(png(figures.against_horizon(lines), "fidelity against horizon"))
    strips = directory / "fidelity.npz"
    if strips.exists():
        with np.load(strips) as arrays:
            for camera in workspace.config.cameras:
                figure = figures.film_strip(
                    arrays[f"real/{camera}"], arrays[f"imagined/{camera}"], camera
                )
                images.append(png(figure, f"held-out episodes, {camera}: open loop"))
    better = [c for c, v in s["fidelity"].items() if v["psnr"] > v["copy_psnr"]]
    text = (
        f"{s['parameters'] / 1e6:.2f} M parameters, {s['transitions']} transitions of "
        f"{s['training_episodes']} episodes; measured on {s['held_out_transitions']} transitions "
        f"of {s['held_out_episodes']} held-out episodes. One chunk ahead the model beats "
        f"copy-last-frame on {len(better)} of {len(s['fidelity'])} views. Unexplained is the "
        "squared error as a share of the real squared change (1: copying), the response how much "
        "the prediction changes when the actions are another transition's."
    )
    return Section("World model", text, [views, follows, reward], images)


def _gates_section(summaries: dict) -> Section:
    rows = [
        (g.name, f"{g.figure:.3g}", f"{'≤' if g.at_most else '≥'} {g.bound:g}", "✓"[: g.reached])
        for g in diagnose.gates([summaries])
    ]
    text = "What imagination, value, selection and optimisation have to reach to be built on."
    return Section("Gates", text, [Table(("gate", "figure", "wanted", "reached"), rows)])


def _improve_section(workspace: Workspace, summaries: dict) -> Section:
    records = read_metrics(workspace.directory("improve") / "metrics.jsonl")
    s = summaries["improve"]
    panels = {
        "imagined_success": "imagined success per branch",
        "approx_kl": "approximate KL",
        "clip_fraction": "clip fraction",
        "value_error": "value error (RMS)",
        "loss": "flow-matching loss on the best chunks",
    }
    lines = {title: _line(records, name) for name, title in panels.items()}
    figure = figures.curves([(t, {"all": line}) for t, line in lines.items() if line[0]])
    text = (
        f"{s['updates']} updates on {s['imagined_chunks']} imagined chunks from "
        f"{s['start_states']} dataset states: {_imagined_change(s)}. What that is worth is in the "
        "first section."
    )
    title = "Policy optimisation in imagination"
    return Section(title, text, images=[png(figure, "updates in the world model")])


def _imagined_change(s: dict) -> str:
    if "kept_score" in s:
        return f"expected return {s['score']:.3f} of all chunks, {s['kept_score']:.3f} of the best"
    first, last = s["imagined_success_first"], s["imagined_success_last"]
    return f"imagined success {first:.3f} → {last:.3f}"


def _run_section(summaries: dict) -> Section:
    rows = [(s, f"{v['minutes']:.1f}", _one_line(s, v)) for s, v in summaries.items()]
    environment = next(iter(summaries.values()))["environment"]
    versions = ", ".join(f"{k} {v}" for k, v in environment["versions"].items())
    text = (
        f"{environment['processor']}; JAX devices: {environment['devices']}; Python "
        f"{environment['python']} on {environment['platform']}; {versions}."
    )
    return Section("What was run", text, [Table(("stage", "minutes", "result"), rows)])


def _line(records: list[dict], name: str) -> tuple[list[float], list[float]]:
    chosen = [r for r in records if name in r]
    return [r["step"] for r in chosen], [r[name] for r in chosen]
