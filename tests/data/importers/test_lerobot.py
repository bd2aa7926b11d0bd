import json

import numpy as np
import pytest

from mbpo_jax.data.importers.recording import Names, convert

pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install -e '.[import]'")
pytest.importorskip("av", reason="av is not installed: pip install -e '.[import]'")
import pyarrow.parquet as pq

from mbpo_jax.data.importers.lerobot import entries
from tests.recordings import Truth, write_lerobot

KINDS = [("v2.1", True), ("v2.1", False), ("v3.0", True), ("v3.0", False)]


@pytest.mark.parametrize(("version", "video"), KINDS)
def test_values_and_order(tmp_path, layout, names, assert_is_truth, version, video):
    truths = [Truth(14 + i) for i in range(3)]
    found = entries(write_lerobot(tmp_path / "set", truths, version, video), names)
    assert [e.name for e in found] == ["episode_000000", "episode_000001", "episode_000002"]
    for entry, truth in zip(found, truths):
        recording = entry.read()
        assert (recording.success, recording.control_rate) == (True, 20)
        facts, episode = convert(entry.name, recording, layout)
        assert facts.problems == []
        assert_is_truth(episode, truth)


def test_images_in_files_of_their_own(tmp_path, layout, names, assert_is_truth):
    truth = Truth()
    root = write_lerobot(tmp_path / "set", [truth], "v2.1", video=False)
    table = next(root.rglob("*.parquet"))
    content = pq.read_table(table)
    for key in [c for c in content.column_names if c.startswith("observation.images")]:
        cells = content[key].to_pylist()
        for i, cell in enumerate(cells):
            (root / f"{key}_{i}.png").write_bytes(cell["bytes"])
            cells[i] = {"bytes": None, "path": f"{key}_{i}.png"}
        content = content.drop_columns(key).append_column(key, [cells])
    pq.write_table(content, table)
    (entry,) = entries(root, names)
    assert_is_truth(convert("a", entry.read(), layout)[1], truth)


def test_renamed_camera(tmp_path, layout, names):
    root = write_lerobot(tmp_path / "set", [Truth()])
    swapped = {
        "observation.images.agentview": "robot0_eye_in_hand",
        "observation.images.robot0_eye_in_hand": "agentview",
    }
    (entry,) = entries(root, Names(names.cameras, swapped))
    _, episode = convert("a", entry.read(), layout)
    np.testing.assert_array_equal(episode.images["robot0_eye_in_hand"][0, 0, 0], [0, 0, 0])
    np.testing.assert_array_equal(episode.images["agentview"][0, 0, 0], [255, 255, 255])


def test_truncated_video(tmp_path, layout, names):
    root = write_lerobot(tmp_path / "set", [Truth(), Truth()], "v2.1")
    video = sorted(root.rglob("*agentview/*.mp4"))[1]
    video.write_bytes(video.read_bytes()[:-200])
    good, bad = entries(root, names)
    assert convert("good", good.read(), layout)[0].problems == []
    (problem,) = convert("bad", bad.read(), layout)[0].problems
    assert "camera 'agentview'" in problem
    assert "episode_000001.mp4: missing, truncated or corrupt" in problem


def test_video_shorter_than_the_table(tmp_path, layout, names):
    root = write_lerobot(tmp_path / "set", [Truth(14), Truth(30)], "v2.1")
    short, long = sorted(root.rglob("*agentview/*.mp4"))
    long.write_bytes(short.read_bytes())
    _, bad = entries(root, names)
    (problem,) = convert("bad", bad.read(), layout)[0].problems
    assert "frames are missing, first 14" in problem


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_truncated_table(tmp_path, names, version):
    root = write_lerobot(tmp_path / "set", [Truth()], version)
    table = next((root / "data").rglob("*.parquet"))
    table.write_bytes(table.read_bytes()[:-30])
    (entry,) = entries(root, names)
    with pytest.raises(ValueError, match=r"parquet: missing, truncated or corrupt"):
        entry.read()


def test_clock(tmp_path, names):
    stamps = np.arange(14) / 10
    (entry,) = entries(write_lerobot(tmp_path / "slow", [Truth()], timestamp=stamps), names)
    assert entry.read().control_rate == 10
    stamps[7:] += 1
    (entry,) = entries(write_lerobot(tmp_path / "uneven", [Truth()], timestamp=stamps), names)
    with pytest.raises(ValueError, match=r"time stamps are uneven: 0\.1000 to 1\.1000 s"):
        entry.read()


def test_ragged_actions(tmp_path, names):
    actions = list(Truth().actions)
    actions[3] = actions[3][:6]
    (entry,) = entries(write_lerobot(tmp_path / "set", [Truth()], action=actions), names)
    with pytest.raises(ValueError, match=r"action: .*sizes: \[6, 7\], first at row 3"):
        entry.read()


def test_not_a_dataset(tmp_path, names):
    with pytest.raises(ValueError, match="is not a LeRobot dataset: it has no meta/info"):
        entries(tmp_path, names)
    root = write_lerobot(tmp_path / "set", [Truth()])
    info = json.loads((root / "meta/info.json").read_text())
    (root / "meta/info.json").write_text(json.dumps(info | {"codebase_version": "v1.6"}))
    with pytest.raises(ValueError, match=r"codebase_version is v1\.6, supported are v2\.0"):
        entries(root, names)
    (root / "meta/info.json").write_text("{")
    with pytest.raises(ValueError, match="has a damaged meta/"):
        entries(root, names)
