import dataclasses
import json

import numpy as np
import pytest

from mbpo_jax.data.formats.conversion import convert
from mbpo_jax.data.formats.recording import Names

pytest.importorskip("h5py", reason="h5py is not installed: pip install -e '.[import]'")
import h5py

from mbpo_jax.data.formats.libero_hdf5 import entries
from tests.recordings import Truth, write_libero_hdf5


def test_frames_are_upright_and_chunks_begin_at_their_frames(
    tmp_path, layout, names, assert_is_truth
):
    truths = [Truth(14 + i) for i in range(11)]
    write_libero_hdf5(tmp_path / "book_demo.hdf5", truths)
    found = entries(tmp_path, names)
    # By number, not "demo_10" after "demo_1".
    assert [e.name for e in found] == [f"book_demo.hdf5:demo_{i}" for i in range(11)]
    for entry, truth in zip(found, truths):
        recording = entry.read()
        assert (recording.success, recording.control_rate) == (True, 20)
        facts, episode = convert(entry.name, recording, layout)
        assert facts.problems == []
        assert facts.camera_sizes == {"agentview": [16, 16], "robot0_eye_in_hand": [16, 16]}
        assert_is_truth(episode, truth)


def test_renamed_keys(tmp_path, layout, names):
    truth = Truth()
    path = write_libero_hdf5(
        tmp_path / "a.hdf5", [truth], **{"obs/front": truth.images["agentview"]}
    )
    renames = {"obs/front": "agentview", "obs/gripper_states": "proprio"}
    (entry,) = entries(path, Names(names.cameras, renames))
    robot = dataclasses.replace(layout.robot, states=("finger_1", "finger_2"))
    _, episode = convert("a", entry.read(), dataclasses.replace(layout, robot=robot))
    np.testing.assert_array_equal(
        episode.images["agentview"][0], truth.images["agentview"][0][::-1, ::-1]
    )
    assert episode.proprio.shape[1] == 2


def test_everything_that_is_missing_is_named(tmp_path, names):
    path = write_libero_hdf5(tmp_path / "a.hdf5", [Truth()])
    with h5py.File(path, "a") as file:
        del file["data/demo_0/obs/agentview_rgb"], file["data/demo_0/actions"]
    (entry,) = entries(path, names)
    with pytest.raises(ValueError, match=r"no field 'actions'.*no camera 'agentview'.*--map="):
        entry.read()


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.95])
def test_truncated_file(tmp_path, layout, names, kept):
    path = write_libero_hdf5(tmp_path / "a.hdf5", [Truth()])
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if kept < 1 else kept])
    (entry,) = entries(path, names)
    with pytest.raises(ValueError, match=r"a\.hdf5: .*truncated"):
        entry.read()


def test_frames_missing_at_the_end(tmp_path, layout, names):
    truth = Truth()
    path = write_libero_hdf5(
        tmp_path / "a.hdf5", [truth], **{"obs/agentview_rgb": truth.images["agentview"][:9]}
    )
    (entry,) = entries(path, names)
    facts, episode = convert("a", entry.read(), layout)
    assert episode is None
    assert "9 frames for 14 actions" in facts.problems[0]


def test_not_a_dataset(tmp_path, names):
    with pytest.raises(ValueError, match=r"is not a LIBERO dataset: it has no \.hdf5"):
        entries(tmp_path, names)


def problems(entry, layout):
    try:
        return convert(entry.name, entry.read(), layout)[0].problems
    except ValueError as error:
        return [str(error)]


def variable_length(count):
    """JPEG-like bytes of different lengths."""
    rows = np.empty(count, object)
    rows[:] = [np.arange(10 + i, dtype=np.uint8) for i in range(count)]
    return rows


@pytest.mark.parametrize("kind", ["fixed", "padded", "vlen", "gray", "video"])
def test_frames_that_are_no_pixels_of_rgb(tmp_path, layout, names, kind):
    path = write_libero_hdf5(tmp_path / "a.hdf5", [Truth(), Truth()])
    with h5py.File(path, "a") as file:
        group = file["data/demo_1/obs"]
        del group["agentview_rgb"]
        if kind == "vlen":
            dataset = group.create_dataset("agentview_rgb", (14,), h5py.vlen_dtype(np.uint8))
            dataset[:] = variable_length(14)
        else:
            group["agentview_rgb"] = {
                "fixed": np.array([b"\xff\xd8 encoded"] * 14, "S20"),
                "padded": np.zeros((14, 676), np.uint8),
                "gray": np.zeros((14, 16, 16), np.uint8),
                "video": np.zeros((1, 14, 16, 16, 3), np.uint8),
            }[kind]
    good, bad = entries(path, names)
    assert problems(good, layout) == []
    (problem,) = problems(bad, layout)
    assert "a.hdf5: data/demo_1/obs/agentview_rgb: it has shape (" in problem


@pytest.mark.parametrize("key", ["actions", "obs/ee_states", "rewards"])
@pytest.mark.parametrize(
    "value",
    [
        "text",
        np.array([b"text"] * 14),
        np.zeros((14, 2, 2)),
        np.zeros((14, 7), complex),
        np.zeros(14, [("a", "f4")]),
        np.full((14, 1), np.nan),
        h5py.Empty("f"),
    ],
    ids=["text", "texts", "axes", "complex", "compound", "nan", "empty"],
)
def test_a_member_of_another_kind_is_a_problem_of_its_demo(tmp_path, layout, names, key, value):
    path = write_libero_hdf5(tmp_path / "a.hdf5", [Truth(), Truth()])
    with h5py.File(path, "a") as file:
        del file[f"data/demo_1/{key}"]
        file[f"data/demo_1/{key}"] = value
    good, bad = entries(path, names)
    assert problems(good, layout) == []
    (problem,) = problems(bad, layout)
    assert f"a.hdf5: data/demo_1: {key}" in problem


def test_other_members_than_demos(tmp_path, layout, names):
    path = write_libero_hdf5(tmp_path / "a.hdf5", [Truth()])
    with h5py.File(path, "a") as file:
        file["data/mean_length"] = 24.0
        file["data/link"] = h5py.SoftLink("/nowhere")
        file["data"].create_group("mask")
    found = {entry.name: problems(entry, layout) for entry in entries(path, names)}
    assert found.keys() == {"a.hdf5:demo_0", "a.hdf5:link", "a.hdf5:mask"}
    assert found["a.hdf5:demo_0"] == []
    assert "link is missing" in found["a.hdf5:link"][0]
    assert "no field 'actions'" in found["a.hdf5:mask"][0]


@pytest.mark.parametrize("data", ["absent", "dataset", "empty"])
def test_files_without_demos(tmp_path, layout, names, data):
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        if data == "dataset":
            file["data"] = 3
        if data == "empty":
            file.create_group("data")
    write_libero_hdf5(tmp_path / "b.hdf5", [Truth()])
    (tmp_path / "c.hdf5").symlink_to("nowhere")
    bad, good, dangling = entries(tmp_path, names)
    assert problems(good, layout) == []
    assert "a.hdf5: data" in problems(bad, layout)[0]
    assert "c.hdf5: missing" in problems(dangling, layout)[0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("problem_info", x) for x in (None, "null", "[]", "{", "{}", 3.0, h5py.Empty("f"))],
        ("problem_info", json.dumps({"language_instruction": ["put", 3]})),
        ("problem_info", b"\xff\xfe"),
        *[("env_args", x) for x in ("null", "[]", "{", 3.0, h5py.Empty("f"))],
        *[
            ("env_args", json.dumps({"env_kwargs": x}))
            for x in (None, [], *({"control_freq": y} for y in (None, "20", 0, np.nan, np.inf)))
        ],
    ],
)
def test_a_bad_attribute_is_named(tmp_path, layout, names, name, value):
    path = write_libero_hdf5(tmp_path / "a.hdf5", [Truth()])
    with h5py.File(path, "a") as file:
        del file["data"].attrs[name]
        if value is not None:
            file["data"].attrs[name] = value
    (entry,) = entries(path, names)
    (problem,) = problems(entry, layout)
    assert "a.hdf5" in problem
    assert name in problem
    if value is None:
        assert "--instruction=" in problem


def test_where_the_instruction_is_from(tmp_path, names):
    truth = Truth()
    truth.instruction = "stack the bowls".split()
    path = write_libero_hdf5(tmp_path / "a.hdf5", [truth], lang="open the door")
    for given, renames, instruction in [
        ({}, {}, "stack the bowls"),
        ({}, {"lang": "instruction"}, "open the door"),
        ({"instruction": "close the door"}, {}, "close the door"),
    ]:
        (entry,) = entries(path, Names(names.cameras, renames, given))
        assert entry.read().instruction == instruction
    truth.instruction = list("stack the bowls")
    (entry,) = entries(write_libero_hdf5(tmp_path / "b.hdf5", [truth]), names)
    assert entry.read().instruction == "stack the bowls"


@pytest.mark.parametrize(
    ("orientation", "down", "right"),
    [("as_stored", 1, 1), ("rotated", -1, -1), ("flipped", -1, 1), ("mirrored", 1, -1)],
)
def test_orientation(tmp_path, layout, names, orientation, down, right):
    truth = Truth()
    (entry,) = entries(write_libero_hdf5(tmp_path / "a.hdf5", [truth]), names)
    layout = dataclasses.replace(layout, orientation=orientation)
    facts, episode = convert("a", entry.read(), layout)
    stored = truth.images["agentview"][0, ::-1, ::-1]
    np.testing.assert_array_equal(episode.images["agentview"][0], stored[::down, ::right])
    assert facts.orientation == orientation


@pytest.mark.parametrize(
    ("rewards", "success", "notes"),
    [
        (np.eye(14)[-1], True, 0),
        (np.arange(14) >= 12, True, 0),
        (np.eye(14)[11], True, 1),
        (np.zeros(14), False, 0),
        (np.ones(14), True, 1),
        (np.ones(()), True, 0),
        (np.linspace(0, 1, 14), None, 0),
        (np.eye(14)[-1] - 1, None, 0),
        (np.eye(14)[-1] / 2, None, 0),
        (np.ones(9), None, 0),
    ],
)
def test_labels(tmp_path, names, rewards, success, notes):
    path = write_libero_hdf5(tmp_path / "a.hdf5", [Truth()], rewards=rewards, ok=1 - rewards)
    (entry,) = entries(path, names)
    if success is None:
        with pytest.raises(ValueError, match=r"rewards: .*"):
            entry.read()
    else:
        recording = entry.read()
        assert (recording.success, recording.label) == (success, "rewards")
        assert len(recording.notes) == notes
    (entry,) = entries(path, Names(names.cameras, {}, {"success": True}))
    assert (entry.read().success, entry.read().notes) == (True, ())
    if success is False:
        (entry,) = entries(path, Names(names.cameras, {"ok": "success"}))
        assert (entry.read().success, entry.read().label) == (True, "ok")


def test_dones_are_the_label_where_there_are_no_rewards(tmp_path, names):
    path = write_libero_hdf5(tmp_path / "a.hdf5", [Truth()], dones=np.zeros(14))
    (entry,) = entries(path, names)
    assert entry.read().label == "rewards"
    with h5py.File(path, "a") as file:
        del file["data/demo_0/rewards"]
    (entry,) = entries(path, names)
    assert (entry.read().success, entry.read().label) == (False, "dones")


@pytest.mark.parametrize(
    ("renames", "given", "named"),
    [
        ({"a": "agent_view"}, {}, "agent_view"),
        ({"a": ""}, {}, "''"),
        ({"a": "agentview", "b": "agentview"}, {}, "agentview"),
        ({"a": "success", "b": "success"}, {}, "success"),
        ({"a": "success", "b": "reward"}, {}, "reward"),
        ({"a": "instruction"}, {"instruction": "lift"}, "instruction"),
        ({"a": "reward"}, {"success": True}, "reward"),
    ],
)
def test_renames_that_nothing_would_use(names, renames, given, named):
    with pytest.raises(ValueError, match=named):
        Names(names.cameras, renames, given)
