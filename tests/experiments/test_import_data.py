"""The command as a user runs it."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("h5py", reason="h5py is not installed: pip install -e '.[import]'")

import h5py

from tests.recordings import Truth, write_libero_hdf5

ROOT = Path(__file__).parents[2]
CONFIG = [
    "--config.suite=my_robot",
    *("--config.chunk=4", "--config.policy.chunk=4"),
    *("--config.demonstrations.render_every=2", "--config.rollouts.render_every=2"),
]


def run(module, *arguments):
    return subprocess.run(
        [sys.executable, "-m", f"experiments.{module}", *CONFIG, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_from_files_to_a_finished_stage(tmp_path):
    files, workdir = tmp_path / "files", tmp_path / "run"
    files.mkdir()
    write_libero_hdf5(files / "good.hdf5", [Truth(), Truth(20)])
    cut = write_libero_hdf5(files / "cut.hdf5", [Truth()])
    cut.write_bytes(cut.read_bytes()[:1000])
    where = ["--format=libero_hdf5", f"--source={files}", f"--workdir={workdir}"]

    refused = run("import_data", *where)
    assert refused.returncode == 1
    assert "1 of 3 episodes are bad:\n  cut.hdf5: " in refused.stderr
    assert "Traceback" not in refused.stderr

    renamed = "--map=obs/eye_in_hand_rgb=agentview"
    imported = run("import_data", *where, "--skip_bad", renamed)
    assert imported.returncode == 0, imported.stderr
    assert "lengths       13 to 19 steps" in imported.stdout
    assert "reading: 100%" in imported.stderr  # the progress bar

    found = run("libero_long", f"--workdir={workdir}", "--stages=demonstrations")
    assert "[demonstrations] finished before" in found.stdout

    exported = subprocess.run(
        [sys.executable, "-m", "experiments.export_data", "--format=lerobot"]
        + [f"--source={workdir}/demonstrations/dataset", f"--target={tmp_path / 'set'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "2 episodes in" in exported.stdout, exported.stderr


def test_a_wrong_rename_is_one_message():
    where = ["--format=rlds", "--source=/absent", "--workdir=/absent"]
    wrong = run("import_data", *where, "--map=nonsense")
    assert wrong.returncode == 1
    assert wrong.stderr == "error: flag --map=['nonsense']: a rename is KEY=NAME\n"


def test_wrong_values_of_flags_are_one_message(tmp_path):
    where = ["--format=rlds", "--source=/absent", f"--workdir={tmp_path}"]
    for wrong in (["--map=a=agentview", "--map=a=proprio"], ["--instruction= "], ["--range=x"]):
        refused = run("import_data", *where, *wrong)
        assert refused.returncode == 1
        assert refused.stderr.startswith("error: ")
        assert refused.stderr.count("\n") == 1


def test_a_file_without_an_instruction(tmp_path):
    path = write_libero_hdf5(tmp_path / "a.hdf5", [Truth()])
    with h5py.File(path, "a") as file:
        del file["data"].attrs["problem_info"]
    where = ["--format=libero_hdf5", f"--source={path}", f"--workdir={tmp_path / 'run'}"]
    refused = run("import_data", *where)
    assert refused.returncode == 1
    assert "problem_info" in refused.stderr
    assert "--instruction=" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert list((tmp_path / "run").iterdir()) == []
    imported = run("import_data", *where, "--instruction=lift the cube", "--orientation=mirrored")
    assert imported.returncode == 0, imported.stderr
    assert "1 x 'lift the cube'" in imported.stdout
    assert "mirrored" in imported.stdout
