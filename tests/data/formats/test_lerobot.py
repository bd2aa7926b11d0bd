import json

import numpy as np
import pytest

from mbpo_jax.data.formats.conversion import convert
from mbpo_jax.data.formats.recording import Names

pytest.importorskip("pyarrow", reason="pyarrow is not installed: pip install -e '.[import]'")
pytest.importorskip("av", reason="av is not installed: pip install -e '.[import]'")
import pyarrow as pa
import pyarrow.parquet as pq

from mbpo_jax.data.formats.lerobot import entries
from tests.recordings import Truth, write_lerobot, write_mp4

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


def problems(entry, layout):
    try:
        return convert(entry.name, entry.read(), layout)[0].problems
    except ValueError as error:
        return [str(error)]


def replace_column(root, key, values, type=None):
    """In the last episode of a dataset of version 2."""
    path = sorted((root / "data").rglob("*.parquet"))[-1]
    table = pq.read_table(path)
    columns = {name: table[name] for name in table.column_names}
    pq.write_table(pa.table(columns | {key: pa.array(values, type)}), path)


def edit_info(root, **entries):
    info = json.loads((root / "meta/info.json").read_text()) | entries
    (root / "meta/info.json").write_text(json.dumps(info))


def edit_last_row(root, **entries):
    """Of meta/; an entry that is ... is removed."""

    def edited(row):
        return {k: v for k, v in (row | entries).items() if v is not ...}

    lines = root / "meta/episodes.jsonl"
    if lines.exists():
        *rows, last = map(json.loads, lines.read_text().splitlines())
        lines.write_text("\n".join(map(json.dumps, [*rows, edited(last)])))
    else:
        path = root / "meta/episodes/chunk-000/file-000.parquet"
        *rows, last = pq.read_table(path).to_pylist()
        rows, last = [dict.fromkeys(entries) | row for row in rows], edited(last)
        pq.write_table(pa.Table.from_pylist([*rows, last]), path)


IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
STATE = "observation.state"
CAMERA = "observation.images.agentview"
VECTOR = [[0.5] * 8] * 14


def at_row_3(values, value):
    return [*values[:3], value, *values[4:]]


@pytest.mark.parametrize(
    ("key", "values", "type", "row"),
    [
        (STATE, at_row_3(VECTOR, None), None, 3),
        (STATE, at_row_3(VECTOR, [0.5] * 7 + [None]), None, 3),
        (STATE, at_row_3(VECTOR, [0.5] * 7 + [np.inf]), None, 3),
        (STATE, at_row_3(VECTOR, [1e300] * 8), pa.list_(pa.float64()), 3),
        (STATE, [["text"] * 8] * 14, None, 0),
        (STATE, [[[0.5]] * 8] * 14, None, 0),
        (STATE, [{"a": 0.5}] * 14, None, 0),
        (STATE, ["text"] * 14, None, None),
        ("next.success", [None] * 13 + [True], None, 0),
        ("next.success", ["yes"] * 14, None, None),
        ("timestamp", at_row_3([i / 20 for i in range(14)], None), None, 3),
        ("timestamp", [1.7e9] * 14, None, 1),
        ("timestamp", at_row_3([i / 20 for i in range(14)], 0.0), None, 3),
        ("timestamp", at_row_3([i / 20 for i in range(14)], np.nan), None, 3),
        ("timestamp", list(range(14)), pa.timestamp("ms"), None),
        (CAMERA, [None] * 14, IMAGE, 0),
        (CAMERA, [{"bytes": None, "path": None}] * 14, IMAGE, 0),
        (CAMERA, [{"bytes": b"no image", "path": None}] * 14, IMAGE, 0),
        (CAMERA, [{"bytes": None, "path": "absent.png"}] * 14, IMAGE, 0),
        (CAMERA, [3] * 14, None, 0),
    ],
)
def test_a_bad_cell_is_a_problem_of_its_episode(tmp_path, layout, names, key, values, type, row):
    root = write_lerobot(tmp_path / "set", [Truth(), Truth()], "v2.1", video=False)
    replace_column(root, key, values, type)
    good, bad = entries(root, names)
    assert problems(good, layout) == []
    (problem,) = problems(bad, layout)
    assert "episode_000001.parquet" in problem
    assert key in problem
    assert row is None or f"row {row}" in problem


def test_frames_of_different_sizes(tmp_path, layout, names):
    from tests.recordings import encoded

    root = write_lerobot(tmp_path / "set", [Truth()], "v2.1", video=False)
    sizes = [16] * 13 + [17]
    cells = [{"bytes": encoded(np.zeros((n, n, 3), np.uint8)), "path": None} for n in sizes]
    replace_column(root, CAMERA, cells, IMAGE)
    (entry,) = entries(root, names)
    (problem,) = problems(entry, layout)
    assert "(17, 17, 3) at row 13" in problem


def test_columns_that_a_table_lacks(tmp_path, layout, names):
    root = write_lerobot(tmp_path / "set", [Truth(), Truth()], "v2.1", video=False)
    path = sorted(root.rglob("*.parquet"))[-1]
    pq.write_table(pq.read_table(path).drop_columns(["action"]), path)
    good, bad = entries(root, names)
    assert problems(good, layout) == []
    assert "no column action" in problems(bad, layout)[0]


@pytest.mark.parametrize(
    ("version", "changes"),
    [
        ("v2.1", {"length": ...}),
        ("v2.1", {"length": None}),
        ("v2.1", {"length": "14"}),
        ("v2.1", {"length": -1}),
        ("v2.1", {"length": float("nan")}),
        ("v2.1", {"tasks": ...}),
        ("v2.1", {"tasks": [None]}),
        ("v2.1", {"tasks": ["one", "two"]}),
        ("v2.1", {"episode_index": "1"}),
        ("v3.0", {"tasks": None}),
        ("v3.0", {"data/chunk_index": None}),
        ("v3.0", {f"videos/{CAMERA}/from_timestamp": ...}),
        ("v3.0", {f"videos/{CAMERA}/from_timestamp": 1e30}),
        ("v3.0", {f"videos/{CAMERA}/to_timestamp": 9.0}),
    ],
)
def test_a_bad_entry_of_meta_is_a_problem_of_its_episode(tmp_path, layout, names, version, changes):
    root = write_lerobot(tmp_path / "set", [Truth(), Truth()], version)
    edit_last_row(root, **changes)
    good, bad = entries(root, names)
    assert problems(good, layout) == []
    (problem,) = problems(bad, layout)
    assert ("episodes.jsonl line 2" if version == "v2.1" else "file-000.parquet row 1") in problem
    (key,) = changes
    assert (key.rpartition("/")[0] or key) in problem


@pytest.mark.parametrize(
    "changes",
    [
        {"fps": 0},
        {"fps": "20"},
        {"fps": None},
        {"fps": float("inf")},
        {"features": []},
        {"data_path": None},
        {"chunks_size": 0},
        {"video_path": None},
    ],
)
def test_a_bad_entry_of_info_is_named(tmp_path, names, changes):
    root = write_lerobot(tmp_path / "set", [Truth()], "v2.1")
    edit_info(root, **changes)
    (key,) = changes
    with pytest.raises(ValueError, match=rf"info\.json.*{key}"):
        entries(root, names)


@pytest.mark.parametrize("template", ["{foo}.parquet", "{0}", "{episode_index:s}", "{"])
def test_a_template_that_cannot_be_filled(tmp_path, names, template):
    root = write_lerobot(tmp_path / "set", [Truth()], "v2.1")
    edit_info(root, data_path=template)
    (entry,) = entries(root, names)
    with pytest.raises(ValueError, match=r"data_path.*info\.json"):
        entry.read()


def test_images_stored_as_numbers(tmp_path, names):
    root = write_lerobot(tmp_path / "set", [Truth()], "v2.1", video=False)
    features = json.loads((root / "meta/info.json").read_text())["features"]
    edit_info(root, features=features | {CAMERA: {"dtype": "uint8", "shape": [16, 16, 3]}})
    with pytest.raises(ValueError, match=rf"agentview: {CAMERA} has dtype 'uint8'"):
        entries(root, names)


def test_blank_lines_and_broken_ones(tmp_path, layout, names):
    root = write_lerobot(tmp_path / "set", [Truth(), Truth()], "v2.1")
    lines = root / "meta/episodes.jsonl"
    first, second = lines.read_text().splitlines()
    lines.write_text(f"{first}\n\n{second}\n\n")
    assert [problems(entry, layout) for entry in entries(root, names)] == [[], []]
    for broken in ("{", "[1]", "null"):
        lines.write_text(f"{first}\n\n{broken}\n")
        good, bad = entries(root, names)
        assert problems(good, layout) == []
        assert "episodes.jsonl line 3" in problems(bad, layout)[0]


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_files_of_the_other_version(tmp_path, names, version):
    root = write_lerobot(tmp_path / "set", [Truth()], version)
    other = "3.0" if version == "v2.1" else "2.1"
    edit_info(root, codebase_version=f"v{other}")
    with pytest.raises(ValueError, match=rf"meta/episodes.* is this version {version[1:]}\?"):
        entries(root, names)


def test_an_episode_without_rows(tmp_path, layout, names):
    root = write_lerobot(tmp_path / "set", [Truth(), Truth()], "v2.1")
    edit_last_row(root, length=0)
    path = sorted(root.rglob("*.parquet"))[-1]
    pq.write_table(pq.read_table(path).slice(0, 0), path)
    good, bad = entries(root, names)
    assert problems(good, layout) == []
    assert "no rows" in problems(bad, layout)[0]


def test_where_the_instruction_is_from(tmp_path, names):
    root = write_lerobot(tmp_path / "set", [Truth()], "v2.1")
    edit_last_row(root, tasks="stack the bowls")
    (entry,) = entries(root, names)
    assert entry.read().instruction == "stack the bowls"
    features = json.loads((root / "meta/info.json").read_text())["features"]
    edit_info(root, features=features | {"note": {"dtype": "string", "shape": [1]}})
    replace_column(root, "note", ["open the door"] * 14)
    (entry,) = entries(root, Names(names.cameras, {"note": "instruction"}))
    assert entry.read().instruction == "open the door"
    edit_last_row(root, tasks=...)
    (entry,) = entries(root, Names(names.cameras, {}, {"instruction": "close the door"}))
    assert entry.read().instruction == "close the door"


def test_dimensions_in_another_order(tmp_path, layout, names):
    root = write_lerobot(tmp_path / "set", [Truth()], "v2.1")
    features = json.loads((root / "meta/info.json").read_text())["features"]
    x, y, *others = layout.robot.actions
    for order, count in (((x, y, *others), 0), ((y, x, *others), 1), (tuple("abcdefg"), 0)):
        action = {"dtype": "float32", "shape": [7], "names": {"motors": order}}
        edit_info(root, features=features | {"action": action})
        (entry,) = entries(root, names)
        assert len(problems(entry, layout)) == count


@pytest.mark.parametrize("start", [0.0, 0.3])
def test_a_stretch_of_video_that_two_episodes_share(tmp_path, layout, names, start):
    root = write_lerobot(tmp_path / "set", [Truth(), Truth(), Truth()])
    edit_last_row(root, **{f"videos/{CAMERA}/from_timestamp": start})
    first, second, third = entries(root, names)
    assert "file-000.mp4" in problems(first, layout)[0]
    assert "with episode 2" in problems(first, layout)[0]
    assert "file-000.mp4" in problems(third, layout)[0]
    assert (problems(second, layout) == []) == (start == 0)


def test_rows_and_numbers_that_two_episodes_share(tmp_path, layout, names):
    root = write_lerobot(tmp_path / "set", [Truth(), Truth()])
    path = root / "meta/episodes/chunk-000/file-000.parquet"
    rows = pq.read_table(path).to_pylist()
    for row, begin in zip(rows, (0, 7)):
        row |= {"dataset_from_index": begin, "dataset_to_index": begin + 14}
    pq.write_table(pa.Table.from_pylist(rows), path)
    assert all("rows" in problems(entry, layout)[0] for entry in entries(root, names))
    rows[1] |= {"dataset_from_index": 14, "dataset_to_index": 28, "episode_index": 0}
    pq.write_table(pa.Table.from_pylist(rows), path)
    found = entries(root, names)
    assert len({entry.name for entry in found}) == 2
    assert all("number" in problems(entry, layout)[0] for entry in found)


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_a_video_longer_than_its_episodes(tmp_path, layout, names, version):
    root = write_lerobot(tmp_path / "set", [Truth()], version)
    write_mp4(next(root.rglob("*agentview/**/*.mp4")), np.zeros((20, 16, 16, 3), np.uint8), 20)
    (entry,) = entries(root, names)
    (problem,) = problems(entry, layout)
    assert ".mp4: it has 20 frames" in problem
    assert "14 rows" in problem
