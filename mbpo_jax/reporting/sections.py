"""The sections of a run's page: what each stage found, as tables and figures."""

import base64

import numpy as np

from mbpo_jax.reporting import diagnose, figures
from mbpo_jax.reporting.fidelity_report import f1_text
from mbpo_jax.reporting.page import Image, Section, Table, png
from mbpo_jax.stages.workspace import Workspace
from mbpo_jax.training.metrics import read_metrics

PAIRS = ("pairs", "both", "first_only", "second_only", "neither")  # of `paired_comparison`


def evaluation_section(workspace: Workspace, summaries: dict) -> Section:
    summary = summaries["evaluate"]
    tables, images = _success(summary, summaries["demonstrations"]["tasks"])
    for kind, video in summary["videos"].items():
        data = (workspace.directory("evaluate") / video["file"]).read_bytes()
        start = f"init state {video['init_state']}" if video["init_state"] >= 0 else "random reset"
        caption = f"improved policy, {kind}: task {video['task']}, {start}"
        images.append(Image(base64.b64encode(data).decode(), "gif", caption))
    text = (
        "All policies started alike, from the shipped init states or from random resets, which no "
        f"earlier stage has seen. {summary['worker_restarts']} simulator workers died or hung; "
        "their episodes were repeated."
    )
    return Section("Success in the simulator", text, tables, images)


def selection_section(workspace: Workspace, summaries: dict) -> Section:
    tables, images = _success(summaries["selection"], summaries["demonstrations"]["tasks"])
    text = (
        "The fine-tuned policy as it acts alone (sampled), and acting on the best, the worst or a "
        f"random one of {workspace.config.evaluation.best_of} chunks, each imagined."
    )
    return Section("Choosing in imagination", text, tables, images)


def evaluated_starts(summary: dict) -> list[tuple[str, str, str]]:
    """The kinds of starts in the summary of an evaluation: what they are called, and their entries
    with successes and with paired tests."""
    kinds = (("init states", "policies", "paired"), ("random resets", "resets", "paired_resets"))
    return [kind for kind in kinds if kind[1] in summary]


def _success(summary: dict, tasks: dict) -> tuple[list[Table], list[Image]]:
    """Success of every way of acting and the paired tests of the first against the others."""
    rows, pairs, groups = [], [], {}
    for starts, key, paired in evaluated_starts(summary):
        first, *_ = summary[key]
        rows += [
            (f"{name}: {task['instruction']}", starts, *_episodes_row(policy["tasks"][number]))
            for name, policy in summary[key].items()
            for number, task in tasks.items()
        ]
        pairs += [
            (
                f"{first} and {name}",
                starts,
                *(str(test[k]) for k in PAIRS),
                f"{test['p_value']:.3g}",
            )
            for name, test in summary[paired].items()
        ]
        groups[starts] = summary[key]
        if len(tasks) > 1:
            groups |= {
                f"task {task},\n{starts}": {n: p["tasks"][task] for n, p in summary[key].items()}
                for task in tasks
            }
    header = ("starts", "success", "goal predicates", "steps when solved", "s per episode")
    solved = ("starts", "pairs", "both", "only the first", "only the second", "neither")
    tables = [
        Table(("policy: task", *header), rows),
        Table(("solved by", *solved, "p (exact McNemar)"), pairs),
    ]
    return tables, [png(figures.success_bars(groups), "success with 95 % Wilson intervals")]


def _episodes_row(part: dict) -> tuple[str, ...]:
    solved = part["mean_length_of_successes"]
    return (
        rate_text(part),
        f"{100 * part['goal_fraction']:.0f} %",
        f"{solved:.0f}" if solved else "–",
        f"{part['seconds_per_episode']:.1f}",
    )


def imagined_section(workspace: Workspace, summaries: dict) -> Section:
    s = summaries["imagine"]
    table = Table(
        ("policy", "imagined success"), [(k, rate_text(v)) for k, v in s["policies"].items()]
    )
    text = (
        "Success on the robot was not measured: it takes the robot. These are the judgements of "
        f"the world model on its own images, over {s['start_states']} branches of {s['chunks']} "
        f"chunks from states of {s['held_out_episodes']} episodes that neither the world model nor "
        "policy optimisation has seen (supervised fine-tuning has seen the demonstrations among "
        "them). A policy that exploits the model's errors scores high here and fails on the robot."
    )
    return Section("Success in imagination, not on the robot", text, [table])


def data_section(workspace: Workspace, summaries: dict) -> Section:
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


def sft_section(workspace: Workspace, summaries: dict) -> Section:
    records = read_metrics(workspace.directory("sft") / "metrics.jsonl")
    figure = figures.curves([("flow-matching loss", {"loss": _line(records, "loss")})])
    s = summaries["sft"]
    text = (
        f"{s['parameters'] / 1e6:.2f} M parameters, {s['steps']} steps; the loss went from "
        f"{records[0]['loss']:.3f} to {records[-1]['loss']:.3f}."
    )
    return Section("Supervised fine-tuning", text, images=[png(figure, "training loss")])


def world_model_section(workspace: Workspace, summaries: dict) -> Section:
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
        "the prediction changes when the actions are another transition's. The gripper is read by "
        "probes that learned from real and imagined frames of the training episodes."
    )
    return Section("World model", text, [views, follows, reward], images)


def gates_section(summaries: dict) -> Section:
    rows = [
        (g.name, f"{g.figure:.3g}", f"{'≤' if g.at_most else '≥'} {g.bound:g}", "✓"[: g.reached])
        for g in diagnose.gates([summaries])
    ]
    text = "What imagination, value, selection and optimisation have to reach to be built on."
    return Section("Gates", text, [Table(("gate", "figure", "wanted", "reached"), rows)])


def improve_section(workspace: Workspace, summaries: dict) -> Section:
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
        f"{s['start_states']} dataset states: {imagined_change(s)}. What that is worth is in the "
        "first section."
    )
    title = "Policy optimisation in imagination"
    return Section(title, text, images=[png(figure, "updates in the world model")])


def imagined_change(s: dict) -> str:
    if "kept_score" in s:
        return f"expected return {s['score']:.3f} of all chunks, {s['kept_score']:.3f} of the best"
    first, last = s["imagined_success_first"], s["imagined_success_last"]
    return f"imagined success {first:.3f} → {last:.3f}"


def rate_text(part: dict) -> str:
    low, high = part["interval"]
    return (
        f"{100 * part['success_rate']:.1f} % ({part['successes']}/{part['episodes']}, 95 % Wilson "
        f"interval {100 * low:.1f}–{100 * high:.1f})"
    )


def _line(records: list[dict], name: str) -> tuple[list[float], list[float]]:
    chosen = [r for r in records if name in r]
    return [r["step"] for r in chosen], [r[name] for r in chosen]
