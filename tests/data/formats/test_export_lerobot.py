import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install -e '.[import]'")
pytest.importorskip("av", reason="av is not installed: pip install -e '.[import]'")

from configs.libero_panda import ROBOT
from mbpo_jax.data.episodes import write_episodes
from mbpo_jax.data.formats import export_lerobot as module
from mbpo_jax.data.formats.conversion import Layout, convert
from mbpo_jax.data.formats.export_lerobot import export_lerobot
from mbpo_jax.data.formats.lerobot import entries
from mbpo_jax.data.formats.recording import Names, Recording
from tests.recordings import CAMERAS, Truth

READ_BACK = Path(__file__).parents[3] / "third_party/lerobot/read_back.py"
LAYOUT = Layout("libero_10", CAMERAS, image_size=16, chunk=4, render_every=2, robot=ROBOT)


def episode(truth, success=True, first=0):
    """With jittered labels, and frames at every third step and the last two."""
    drawn = np.union1d(np.arange(first, truth.steps, 3), [truth.steps - 2, truth.steps - 1])
    recording = Recording(
        instruction=truth.instruction,
        actions=truth.actions,
        proprio=truth.proprio,
        images={c: lambda steps, c=c: truth.images[c][steps] for c in CAMERAS},
        success=success,
        control_rate=20,
        target_actions=truth.actions + 0.5,
        drawn=drawn,
    )
    return convert("a", recording, LAYOUT)[1]


def test_import_gives_the_same_episodes(tmp_path, assert_same_episode):
    episodes = [episode(Truth(14)), episode(Truth(17), success=False)]
    assert export_lerobot(tmp_path / "set", iter(episodes), control_rate=10) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["set"]
    found = entries(tmp_path / "set", Names(CAMERAS, {}))
    for entry, original in zip(found, episodes, strict=True):
        recording = entry.read()
        assert recording.control_rate == 10
        slow = dataclasses.replace(LAYOUT, robot=dataclasses.replace(ROBOT, control_hz=10))
        assert_same_episode(convert(entry.name, recording, slow)[1], original)


def test_begins_at_the_first_frame(tmp_path):
    late = episode(Truth(14), first=2)
    export_lerobot(tmp_path / "set", [late], control_rate=20)
    (entry,) = entries(tmp_path / "set", Names(CAMERAS, {}))
    _, again = convert("a", entry.read(), LAYOUT)
    assert again.length == late.length - 2
    np.testing.assert_array_equal(again.timesteps, late.timesteps - 2)
    np.testing.assert_array_equal(again.actions, late.actions)


def test_several_files(tmp_path, monkeypatch, assert_same_episode):
    monkeypatch.setattr(module, "FILE_BYTES", 1)
    episodes = [episode(Truth(14 + i)) for i in range(3)]
    export_lerobot(tmp_path / "set", episodes, control_rate=20)
    assert len(list((tmp_path / "set/data").rglob("*.parquet"))) == 3
    for entry, original in zip(entries(tmp_path / "set", Names(CAMERAS, {})), episodes):
        assert_same_episode(convert("a", entry.read(), LAYOUT)[1], original)


def test_statistics(tmp_path):
    a, b = Truth(14), Truth(17)
    export_lerobot(tmp_path / "set", [episode(a), episode(b)], control_rate=20)
    stats = json.loads((tmp_path / "set/meta/stats.json").read_text())
    rows = np.concatenate([a.actions, b.actions])
    assert stats["action"]["count"] == [31]
    np.testing.assert_allclose(stats["action"]["mean"], rows.mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(stats["action"]["std"], rows.std(axis=0), atol=1e-6)
    assert np.shape(stats["observation.images.agentview"]["mean"]) == (3, 1, 1)
    assert stats["observation.images.agentview"]["max"][2] == [[200 / 255]]


def test_refuses_what_it_cannot_write(tmp_path):
    good = episode(Truth(14))
    gap = episode(Truth(14))
    gap.num_actions[1] = 1
    with pytest.raises(ValueError, match=r"episode 1 cannot be written .* step 4 is in none"):
        export_lerobot(tmp_path / "set", [good, gap], control_rate=20)
    with pytest.raises(ValueError, match="no episodes"):
        export_lerobot(tmp_path / "set", [], control_rate=20)
    other = episode(Truth(14))
    other.images = {"agentview": other.images["agentview"]}
    with pytest.raises(ValueError, match="episode 1 has other cameras"):
        export_lerobot(tmp_path / "set", [good, other], control_rate=20)
    assert list(tmp_path.iterdir()) == []
    export_lerobot(tmp_path / "set", [good], control_rate=20)
    with pytest.raises(ValueError, match="already exists"):
        export_lerobot(tmp_path / "set", [good], control_rate=20)


def test_lerobot_reads_it(tmp_path):
    """What LeRobot's reader returns for a dataset that the command wrote."""
    python = os.environ.get("LEROBOT_PYTHON")
    if python is None:
        pytest.skip("LEROBOT_PYTHON names no Python with LeRobot (third_party/lerobot/README.md)")
    a, b = Truth(14), Truth(17)
    b.instruction = "close the drawer"
    write_episodes(tmp_path / "dataset", [episode(a), episode(b, success=False)])
    command = [sys.executable, "-m", "experiments.export_data", "--format=lerobot"]
    paths = [f"--source={tmp_path / 'dataset'}", f"--target={tmp_path / 'set'}"]
    subprocess.run([*command, *paths], check=True, cwd=READ_BACK.parents[2])
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    offline.pop("PYTHONPATH", None)
    subprocess.run(
        [python, READ_BACK, tmp_path / "set", tmp_path / "read.npz"], check=True, env=offline
    )
    read = np.load(tmp_path / "read.npz", allow_pickle=False)
    assert (read["num_episodes"], read["fps"]) == (2, 20)
    assert read["task"].tolist() == [a.instruction] * 14 + [b.instruction] * 17
    np.testing.assert_array_equal(read["episode_index"], [0] * 14 + [1] * 17)
    np.testing.assert_allclose(read["timestamp"][14:], np.arange(17) / 20, atol=1e-6)
    np.testing.assert_array_equal(read["action"][:13], a.actions[:13])
    np.testing.assert_array_equal(read["next.success"].nonzero()[0], [13])
    # Step 4 repeats the frame of step 3.
    for camera in CAMERAS:
        frames = np.moveaxis(a.images[camera][[3, 3]], -1, 1) / 255
        np.testing.assert_allclose(read[f"observation.images.{camera}"][3:5], frames, atol=1e-6)
    np.testing.assert_allclose(read["mean/action"], read["action"].mean(axis=0), atol=1e-6)
