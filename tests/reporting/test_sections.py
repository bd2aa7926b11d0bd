"""The report's tables of success say for each task, kind of start and way of acting what it did."""

from configs.libero_long import get_config
from mbpo_jax.reporting.sections import evaluated_starts, selection_section
from mbpo_jax.stages.statistics import paired_comparison, summarize
from mbpo_jax.stages.workspace import Workspace

TASKS = {"3": {"instruction": "close the drawer"}, "5": {"instruction": "stow the book"}}


def episodes(solved):
    """Two resets of each task; `solved` are (task, seed)."""
    return [
        {
            "task": task,
            "init_state": -1,
            "seed": seed,
            "success": (task, seed) in solved,
            "goal_fraction": float((task, seed) in solved),
            "length": 100 + seed,
            "seconds": 1.0,
        }
        for task in (3, 5)
        for seed in (0, 1)
    ]


def test_choices_of_chunks_per_task(tmp_path):
    worst, best = episodes({(5, 1)}), episodes({(3, 0), (3, 1), (5, 1)})
    summary = {
        "resets": {n: summarize(e, (3, 5)) for n, e in (("worst", worst), ("best", best))},
        "paired_resets": {"best": paired_comparison(worst, best)},
    }
    assert [starts for starts, *_ in evaluated_starts(summary)] == ["random resets"]
    workspace = Workspace(tmp_path, get_config("tiny"))
    found = selection_section(workspace, {"selection": summary, "demonstrations": {"tasks": TASKS}})
    success, pairs = found.tables
    shares = {row[0]: row[2].split("(")[1].split(",")[0] for row in success.rows}
    assert shares == {
        "worst: close the drawer": "0/2",
        "worst: stow the book": "1/2",
        "best: close the drawer": "2/2",
        "best: stow the book": "1/2",
    }
    assert [row[4] for row in success.rows] == ["–", "101", "100", "101"]  # steps when solved
    # Of four starts one is solved by both, two by the best alone: p = 2 / 2^2.
    assert [list(row) for row in pairs.rows] == [
        ["worst and best", "random resets", "4", "1", "0", "2", "1", "0.5"]
    ]
    assert [image.kind for image in found.images] == ["png"]
