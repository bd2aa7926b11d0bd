from pathlib import Path

import numpy as np
import pytest

from experiments.parity import main
from experiments.parity_suites import pi05

FIXTURES = Path(__file__).parents[2] / "fixtures" / "pi05"


def test_golden_network():
    rows = pi05.run(FIXTURES / "pi05_tiny")
    names = {name.removeprefix("pi05_tiny/") for name, *_ in rows}
    assert {"prefix_out", "v_t", "loss", "sample_actions_3", "sample_actions_10"} <= names
    assert [row for row in rows if not row[-1]] == []


def test_golden_flow():
    rows = pi05.run(FIXTURES / "flow_rl")
    names = {name.removeprefix("flow_rl/") for name, *_ in rows}
    assert {"step/flow_sde/a0.5/n3/mean", "chain/flow_noise/joint/logprob"} <= names
    assert [row for row in rows if not row[-1]] == []


def test_command_reports_a_difference(tmp_path, capsys):
    golden = dict(np.load(FIXTURES / "flow_rl" / "flow_rl.npz"))
    golden["schedule/4/flow_sde/sigma"] = golden["schedule/4/flow_sde/sigma"] * 1.001
    np.savez(tmp_path / "flow_rl.npz", **golden)
    assert main(["--suite=pi05", f"--fixtures={tmp_path}"]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if "FAIL" in line]
    assert len(failed) == 1
    assert "schedule/4/flow_sde/sigma" in failed[0]
    assert main(["--suite=pi05", f"--fixtures={tmp_path}", "--precision=tf32"]) == 0


def test_folder_without_golden_data(tmp_path):
    with pytest.raises(SystemExit) as error:
        main(["--suite=pi05", f"--fixtures={tmp_path}"])
    assert error.value.code != 0
