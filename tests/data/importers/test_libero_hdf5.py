import dataclasses

import numpy as np
import pytest

from mbpo_jax.data.importers.recording import Names, convert

pytest.importorskip("h5py", reason="h5py is not installed: pip install -e '.[import]'")
import h5py

from mbpo_jax.data.importers.libero_hdf5 import entries
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
