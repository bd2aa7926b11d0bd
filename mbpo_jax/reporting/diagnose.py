"""The gates: whether a run's imagination, value, selection and optimisation are good enough to
build on, from the numbers that its stages measured."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mbpo_jax.selection import CHOICES
from mbpo_jax.stages.statistics import mcnemar_exact
from mbpo_jax.stages.workspace import StageError, Workspace

STAGES = ("world_model", "value", "selection", "siblings", "improve", "evaluate")


@dataclass(frozen=True)
class Gate:
    """A figure and what it has to reach: at least `bound`, or at most where `at_most`."""

    name: str
    figure: float
    bound: float
    at_most: bool = False

    @property
    def reached(self) -> bool:
        """False for NaN too."""
        return self.figure <= self.bound if self.at_most else self.figure >= self.bound


def read_summaries(workspace: Workspace) -> dict[str, dict]:
    """Stage -> what it reported, of a run's finished stages.

    Raises:
        StageError: the world model has not been trained, or no episodes were held out.
    """
    world = workspace.require("world_model")
    if not world["held_out_episodes"] or "imagination" not in world:
        raise StageError(
            f"{workspace.directory('world_model')} has no figures of held-out episodes: run the "
            "stage again with --config.world_model.holdout_fraction above 0"
        )
    found = {stage: workspace.summary(stage) for stage in STAGES}
    return {stage: summary for stage, summary in found.items() if summary is not None}


def read_pool(folder: Path) -> list[dict[str, dict]]:
    """The same of every kept `results.json` in a folder.

    Raises:
        StageError: there is none, or one that is not a run's.
    """
    paths = sorted(Path(folder).glob("*.json"))
    if not paths:
        raise StageError(f"{folder} holds no results of runs (*.json)")
    pool = []
    for path in paths:
        try:
            pool.append(json.loads(path.read_text())["stages"])
            pool[-1]["world_model"]["imagination"]
        except (ValueError, KeyError, TypeError) as error:
            raise StageError(
                f"{path} is not the results.json of a run whose world model was measured "
                f"({error!r})"
            ) from error
    return [{s: results[s] for s in STAGES if s in results} for results in pool]


def gates(runs: Sequence[Mapping[str, dict]]) -> list[Gate]:
    """The gates of a run, or of several pooled: figures are means over runs, successes and paired
    tests are over all their episodes."""
    return [
        *_imagination(runs),
        *_value(runs),
        *_selection(runs),
        *_siblings(runs),
        *_optimisation(runs),
    ]


def table(found: Sequence[Gate]) -> str:
    """One line per gate."""
    lines = [f"{'gate':<58}{'figure':>9}{'wanted':>10}"]
    for gate in found:
        bound = f"{'<=' if gate.at_most else '>='} {gate.bound:g}"
        missed = "" if gate.reached else "   missed"
        lines.append(f"{gate.name:<58}{gate.figure:>9.3g}{bound:>10}{missed}")
    return "\n".join(lines)


def _mean(runs: Sequence[Mapping], read: Callable[[Mapping], float | None]) -> float | None:
    values = [x for run in runs if (x := read(run)) is not None]
    return sum(values) / len(values) if values else None


def _imagination(runs: Sequence[Mapping]) -> Iterator[Gate]:
    head, *others = runs[0]["world_model"]["imagination"]["views"]
    for camera, one, four in ((head, 0.22, 0.40), *((c, 0.32, 0.50) for c in others)):

        def view(run, camera=camera):
            return run["world_model"]["imagination"]["views"][camera]

        def after_four(run, camera=camera):
            curve = run["world_model"].get("horizon", {}).get(camera, {}).get("unexplained", [])
            return curve[3] if len(curve) > 3 else None

        yield Gate(
            f"{camera}: unexplained change",
            _mean(runs, lambda r: view(r)["unexplained"]),
            one,
            True,
        )
        later = _mean(runs, after_four)
        if later is not None:
            yield Gate(f"{camera}: unexplained after 4 chunks", later, four, True)
        yield Gate(
            f"{camera}: response to the actions", _mean(runs, lambda r: view(r)["response"]), 0.55
        )
        yield Gate(
            f"{camera}: gripper read from imagined frames (cm)",
            _mean(
                runs,
                lambda r, c=camera: r["world_model"]["imagination"]["gripper_cm"][c]["imagined"],
            ),
            2.0,
            True,
        )
    first = _mean(runs, lambda r: r["world_model"]["imagination"]["true_chunk_first"])
    if first is not None:
        yield Gate("true chunk first among 16", first, 0.8)


def _value(runs: Sequence[Mapping]) -> Iterator[Gate]:
    for kind in ("real", "imagined"):

        def held_out(run, kind=kind):
            return run.get("value", {}).get("held_out", {}).get(kind, {}).get("auc")

        auc = _mean(runs, held_out)
        if auc is not None:
            yield Gate(f"value: AUC of {kind} held-out frames", auc, 0.8)


def _selection(runs: Sequence[Mapping]) -> Iterator[Gate]:
    chosen = [run["selection"]["resets"] for run in runs if "selection" in run]
    if chosen:
        rate = {name: _pooled(chosen, name) for name in CHOICES}
        yield Gate("selection: best - worst (points)", rate["best"] - rate["worst"], 35)
        yield Gate("selection: best - random (points)", rate["best"] - rate["random"], 15)


def _siblings(runs: Sequence[Mapping]) -> Iterator[Gate]:
    compared = [run["siblings"] for run in runs if "siblings" in run]
    for kind in ("imagined", "real"):

        def known(found, kind=kind):
            first = found[kind][0] if kind == "imagined" else found[kind]
            return first["correlation"]

        if compared:
            name = f"siblings: return after 1 {kind} chunk tells success"
            yield Gate(name, _mean(compared, known), 0.2)


def _optimisation(runs: Sequence[Mapping]) -> Iterator[Gate]:
    evaluated = [run["evaluate"] for run in runs if "resets" in run.get("evaluate", {})]
    if not evaluated:
        return
    resets = [e["resets"] for e in evaluated]
    sft = _pooled(resets, "sft")
    yield Gate("improved - fine-tuned (points)", _pooled(resets, "improved") - sft, 10)
    pairs = [e["paired_resets"]["improved"] for e in evaluated]
    p = mcnemar_exact(sum(x["first_only"] for x in pairs), sum(x["second_only"] for x in pairs))
    yield Gate("improved - fine-tuned: p (exact McNemar)", p, 0.01, True)
    if all("improved_best" in r for r in resets):
        best = _pooled(resets, "improved_best") - sft
        yield Gate("improved, best of 16 - fine-tuned (points)", best, 20)


def _pooled(parts: Sequence[Mapping], name: str) -> float:
    """Success in percent over all episodes."""
    successes = sum(part[name]["successes"] for part in parts)
    return 100 * successes / sum(part[name]["episodes"] for part in parts)
