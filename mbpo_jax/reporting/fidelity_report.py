"""Stage `fidelity` with its page."""

import json
from collections.abc import Mapping
from pathlib import Path

from mbpo_jax.reporting import figures
from mbpo_jax.reporting.page import Section, Table, png, render
from mbpo_jax.stages.build import Config
from mbpo_jax.stages.contenders import Strips
from mbpo_jax.stages.fidelity import study_fidelity
from mbpo_jax.stages.workspace import Workspace


def report_fidelity(workspace: Workspace, directory: Path) -> dict:
    """Runs `study_fidelity`, writes `report.html` and returns the numbers. Raises StageError."""
    summary, real, imagined = study_fidelity(workspace, directory)
    page = directory / "report.html"
    write(page, workspace.config, summary, real, imagined)
    print(f"\n{table(summary)}\nreport: {page}")
    return summary


def write(
    path: Path, config: Config, summary: dict, real: Strips, imagined: dict[str, Strips]
) -> None:
    """Writes the page.

    Args:
        summary, real, imagined: what `study_fidelity` returns.
    """
    models = summary["models"]
    sections = [
        _images(config, models, summary["real"]),
        _reward(models),
        _horizon(config, models),
        _motion(config, models),
        _out_of_view(models),
    ]
    pictures = [
        png(figures.film_strip(real[camera], strips[camera], camera), f"{name}, open loop")
        for name, strips in imagined.items()
        for camera in config.cameras
    ]
    sections.append(Section("Film strips of held-out episodes", images=pictures))
    page = render(
        title="World-model fidelity",
        subtitle=f"{config.suite}, tasks {', '.join(map(str, config.tasks))}; chunks of "
        f"{config.chunk} steps; seed {config.seed}",
        verdict=_verdict(models),
        sections=sections,
        config=json.dumps(json.loads(config.to_json_best_effort()), indent=1),
    )
    path.write_text(page, encoding="utf-8")


def f1_text(reward: Mapping) -> str:
    """F1 and its interval, of the numbers of `metrics.classification` and `f1_interval`."""
    low, high = reward["f1_interval"]
    return f"{reward['f1']:.3f} ({low:.2f}–{high:.2f})"


def table(summary: dict) -> str:
    """A line per model for the terminal."""
    lines = []
    for name, m in summary["models"].items():
        views = ", ".join(
            f"{camera} {v['psnr']:.1f} dB (copy {v['copy_psnr']:.1f})"
            for camera, v in m["views"].items()
        )
        lines.append(
            f"{name:<20} {views}; reward F1 {f1_text(m['reward'])}; views disagree by "
            f"{m['disagreement_cm']:.1f} cm; {1e3 * m['seconds_per_chunk']:.0f} ms per chunk"
        )
    return "\n".join(lines)


def _verdict(models: dict) -> str:
    name, main = next(iter(models.items()))
    better = [c for c, v in main["views"].items() if v["psnr"] > v["copy_psnr"]]
    return (
        f"{name} beats copying the last frame on {len(better)} of {len(main['views'])} views; its "
        f"reward has F1 {f1_text(main['reward'])} on {main['reward']['frames']} frames."
    )


def _images(config: Config, models: dict, real: dict) -> Section:
    rows = []
    for name, m in models.items():
        for camera, v in m["views"].items():
            perceptual = "–" if v["lpips"] is None else f"{v['lpips']:.3f}"
            rows.append(
                (name, camera, f"{v['psnr']:.2f}", f"{v['ssim']:.3f}", perceptual)
                + (f"{m['disagreement_cm']:.2f}", f"{1e3 * m['seconds_per_chunk']:.0f}")
            )
    first = next(iter(models.values()))
    for camera, v in first["views"].items():
        row = ("copy the last frame", camera, f"{v['copy_psnr']:.2f}", f"{v['copy_ssim']:.3f}")
        rows.append((*row, "–", "–", "0"))
    header = ("model", "view", "PSNR (dB)", "SSIM", "LPIPS", "disagreement (cm)", "ms per chunk")
    text = (
        "One chunk ahead, on held-out transitions. Disagreement is the distance between the "
        "gripper's positions that probes read from the views; on the real frames "
        f"it is {real['disagreement_cm']:.2f} cm, which is the probes' own error. Milliseconds are "
        "the median of single predictions of both views."
    )
    return Section("Images", text, [Table(header, rows)])


def _reward(models: dict) -> Section:
    rows = []
    for name, m in models.items():
        shares = (f"{m['reward'][k]:.3f}" for k in ("accuracy", "precision", "recall"))
        error = f"{m['reward']['calibration_error']:.3f}"
        rows.append((name, *shares, f1_text(m["reward"]), error))
    r = next(iter(models.values()))["reward"]
    text = (
        f"{r['frames']} held-out frames, {r['yes_frames']} of them done. F1 has its 95 % bootstrap "
        "interval over episodes. The calibration error is the mean gap between the predicted "
        "probability and the share of done frames, over ten bins."
    )
    figure = figures.reliability(
        {
            name: [m["reward"][k] for k in ("bin_probability", "bin_yes_share", "bin_count")]
            for name, m in models.items()
        }
    )
    header = ("model", "accuracy", "precision", "recall", "F1", "calibration error")
    return Section("Reward", text, [Table(header, rows)], [png(figure, "calibration")])


def _horizon(config: Config, models: dict) -> Section:
    lines = {
        camera: {name: m["horizon"][camera]["psnr"] for name, m in models.items()}
        | {"copy of the start": next(iter(models.values()))["horizon"][camera]["copy_psnr"]}
        for camera in config.cameras
    }
    text = f"Open loop over {config.world_model.horizon} chunks."
    figure = figures.against_horizon(lines)
    return Section("Error against horizon", text, images=[png(figure, "PSNR against horizon")])


def _motion(config: Config, models: dict) -> Section:
    text = (
        "Pixel change from the current to the next frame, imagined against real, by decile of the "
        "real change: below the diagonal, motion is underestimated."
    )
    lines = {
        camera: {name: m["views"][camera]["motion"] for name, m in models.items()}
        for camera in config.cameras
    }
    return Section("Motion", text, images=[png(figures.motion(lines), "motion by decile")])


def _out_of_view(models: dict) -> Section:
    def number(value):
        return "–" if value is None else f"{value:.1f}"

    rows = [
        (name, camera, f"{100 * v['out_of_view']['unseen_share']:.1f} %")
        + tuple(number(v["out_of_view"][kind]) for kind in ("seen_rms", "unseen_rms"))
        for name, m in models.items()
        for camera, v in m["views"].items()
    ]
    text = (
        "Patches of 8 × 8 pixels (at 64 pixels per side) of the real next frame that no window of "
        "the current frame resembles came into view during the chunk, and a model has to invent "
        "them. Errors are root mean squares in grey levels."
    )
    header = ("model", "view", "came into view", "error where seen", "error where not")
    return Section("Out of view", text, [Table(header, rows)])
