"""The experiment `compounding_error`, small: command line, files, reproducibility."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from configs import compounding_error as configs
from experiments import compounding_error as experiment
from experiments.theory import bounds, claims, paragraphs, report

ROOT = Path(__file__).parents[3]


def tiny_config():
    config = configs.get_config("quick")
    config.update({
        "random": {"problems": 50, "batch": 10, "states": 3, "k": 2, "ns": (1, 2)},
        "adversarial": {"ks": (2,), "ns": (2,), "gammas": (0.5,), "restarts": 3, "steps": 150},
        "trade_off": {"states": 3, "k": 2, "n_max": 3, "problems": 4, "grid_points": 2},
        "learned": {"states": 3, "k": 2, "n_max": 3, "horizon": 4, "episodes": (5, 50),
                    "problems": 2},
        "gamma": 0.9,
    })  # fmt: skip
    return config


def run_module(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "experiments.compounding_error", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip


def test_case_study_is_one_json_line():
    done = run_module("--case_study")
    assert done.returncode == 0
    assert done.stdout.count("\n") == 1
    assert json.loads(done.stdout) == {
        "full": {"eps_pi": 4183.3, "eps_m": 18916.6},
        "branched": {"n": 2, "eps_pi": 1710.8, "eps_m": 400.0},
    }


def test_unknown_key_names_the_nearest():
    done = run_module("--config.learned.episode=3")
    assert done.returncode == 1
    assert "episodes" in done.stderr
    assert "Traceback" not in done.stderr


def test_entries_out_of_range_are_one_message():
    done = run_module("--case_study", "--config.gamma=nan", "--config.random.problems=0")
    assert done.returncode == 1
    assert "gamma is nan" in done.stderr
    assert "random.problems is 0" in done.stderr
    assert "Traceback" not in done.stderr


def test_unknown_variant_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'full'"):
        configs.get_config("ful")


def test_config_is_locked():
    with pytest.raises(AttributeError, match="gama"):
        configs.get_config("full").gama = 0.9


@pytest.fixture(scope="module")
def results():
    return experiment.run(tiny_config())


def test_same_config_same_bytes_and_every_file(results, tmp_path):
    report.write(results, tmp_path / "a")
    report.write(experiment.run(tiny_config()), tmp_path / "b")
    first = (tmp_path / "a" / "results.json").read_bytes()
    assert first == (tmp_path / "b" / "results.json").read_bytes()
    assert json.loads(first)["config"]["gamma"] == 0.9
    other = tiny_config()
    other.seed = 1
    assert experiment.run(other)["random"] != results["random"]

    page = (tmp_path / "a" / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=.(?!data:)", page)
    for name, heading, _, describe in report.SECTIONS:
        image = (tmp_path / "a" / "figures" / f"{name}.png").read_bytes()
        assert image.startswith(b"\x89PNG")
        assert len(image) > 5000
        assert heading in page
        assert len(describe(results)) > 100
    assert page.count("data:image/png;base64,") == len(report.SECTIONS)
    rows = (tmp_path / "a" / "tables" / "claims.csv").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 1 + len(claims.CLAIMS)
    for name in report.counterexamples(results):
        found, _ = report.load_counterexample(tmp_path / "a" / "counterexamples" / f"{name}.json")
        assert found["ratio"] > 1


def test_results_agree_with_the_library(results):
    sweep = results["coefficients"]["n"]
    assert sweep["published branch"]["eps_m"][2] == pytest.approx(bounds.branched(0.9, 10, 2).eps_m)
    assert results["random"]["problems"] == 50
    assert not any(
        found["ratio"] > 1 + 1e-6
        for name, found in results["adversarial"].items()
        if claims.claim(name).holds
    )
    curves = results["trade_off"]["curves"]
    # Without imagination there is no model error; the parts are the two ends of the gap.
    assert curves["model_part"][0] == 0
    assert curves["off_policy_part"][0] == pytest.approx(curves["exact"][0])
    assert set(results["learned"]["settings"]) == {"markov", "floor", "phased"}


def test_paragraphs_follow_the_numbers(results):
    broken = json.loads(json.dumps(results))
    broken["adversarial"]["corrected_full_given"]["ratio"] = 1.5
    assert "No corrected bound was exceeded" in paragraphs.ratios(results)
    assert "CORRECTED BOUNDS EXCEEDED: corrected_full_given" in paragraphs.ratios(broken)
