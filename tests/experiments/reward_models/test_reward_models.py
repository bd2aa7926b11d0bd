"""Reward models side by side: the numbers, the page, one message."""

import numpy as np
import pytest

from experiments.reward_models import report
from experiments.reward_models.__main__ import chosen, main


def test_numbers_of_a_model():
    probability = np.array([0.9, 0.8, 0.3, 0.6, 0.1])
    index = np.array([[0, 0, 1], [0, 1, 1], [0, 2, 0], [1, 0, 0], [1, 1, 0]])
    row = report.row(probability, index)
    assert row["f1"] == pytest.approx(2 * 2 / (3 + 2))
    assert (row["precision"], row["recall"]) == (pytest.approx(2 / 3), 1)
    assert row["accuracy"] == pytest.approx(0.8)
    assert row["auc"] == 1
    assert (row["frames"], row["yes_frames"], row["episodes"]) == (5, 2, 2)
    # Each frame has a bin of its own: the mean distance of probability and label.
    assert row["calibration_error"] == pytest.approx((0.1 + 0.2 + 0.3 + 0.6 + 0.1) / 5)
    pictures = [{"episode": 0, "steps": [0, 5, 10], "label": [0, 0, 1],
                 "models": {"umm": [0.1, 0.2, 0.9]}}]  # fmt: skip
    html = report.page("suite", {"umm": row, "openai": row}, pictures)
    assert html.count("0.80 (") == 2
    assert "data:image/png" in html


def test_models_are_named_once():
    assert chosen("umm,openai,umm") == ["umm", "openai"]


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--reward_model=opnai"], "'openai'"),
        (["--reward_model="], "umm"),
        ([], "no working directory"),
    ],
)
def test_what_cannot_be_scored_is_one_message(arguments, hint, tmp_path, capsys):
    assert main([f"--workdir={tmp_path}", *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert hint in error
