import errno
import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from mbpo_jax.data.episodes import RobotEpisodes, read_episodes, write_episodes


def test_round_trip_is_exact_and_ordered(tmp_path, make_episode, assert_same_episode):
    episodes = [
        make_episode([0, 3, 4, 9], seed=s, success=s % 2 == 0, goal_fraction=s / 3)
        for s in range(12)
    ]
    episodes.append(make_episode([0, 1], source="sft", init_state_id=49, instruction="öffne α"))
    assert write_episodes(tmp_path / "runs" / "demos", iter(episodes)) == 13
    again = read_episodes(tmp_path / "runs" / "demos")
    assert len(again) == 13
    for a, b in zip(again, episodes):
        assert_same_episode(a, b)
    assert os.listdir(tmp_path / "runs") == ["demos"]


def test_rlds_fields_for_outsiders(tmp_path, make_episode):
    won, lost = make_episode([0, 4, 6]), make_episode([0, 4], success=False)
    write_episodes(tmp_path / "data", [won, lost])
    source = tfds.builder_from_directory(tmp_path / "data").as_data_source("train")
    steps = [list(example["steps"]) for example in source]

    def column(name, i):
        return [step[name].item() for step in steps[i]]

    assert column("timestep", 0) == [0, 4, 6]
    assert column("is_first", 0) == [True, False, False]
    assert column("is_last", 0) == [False, False, True]
    assert column("is_terminal", 0) == [False, False, True]
    assert column("reward", 0) == [0, 0, 1]
    assert column("discount", 0) == [1, 1, 0]
    # A failure is cut off by the time limit: last, but not terminal.
    assert column("is_last", 1) == [False, True]
    assert column("is_terminal", 1) == [False, False]
    assert column("reward", 1) == [0, 0]
    assert column("discount", 1) == [1, 1]
    second = steps[0][1]
    assert second["language_instruction"] == b"pick up the book"
    np.testing.assert_array_equal(second["observation"]["wrist"], won.images["wrist"][1])
    np.testing.assert_array_equal(second["target_action"], won.target_actions[1])
    metadata = source[1]["episode_metadata"]
    assert metadata["success"] == np.False_
    assert metadata["goal_fraction"] == 1 / 3


def test_no_tensorflow():
    code = "import sys, mbpo_jax.data.episodes; sys.exit('tensorflow' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_stopped_write_leaves_nothing_that_reads_as_a_dataset(tmp_path, make_episode):
    def stopped():
        yield make_episode([0, 1])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_episodes(tmp_path / "data", stopped())
    with pytest.raises(ValueError, match=r"no dataset at .*run the stage"):
        read_episodes(tmp_path / "data")
    write_episodes(tmp_path / "data", [make_episode([0, 1])])
    assert len(read_episodes(tmp_path / "data")) == 1


def test_killed_write_can_be_repeated(tmp_path, make_episode):
    leftover = tmp_path / ".data.unfinished" / "robot_episodes" / "1.0.0"
    leftover.mkdir(parents=True)
    (leftover / "dataset_info.json").write_text("half of it")
    write_episodes(tmp_path / "data", [make_episode([0, 1])])
    assert len(read_episodes(tmp_path / "data")) == 1
    assert os.listdir(tmp_path) == ["data"]


def test_refuses_bad_input(tmp_path, make_episode):
    with pytest.raises(ValueError, match="no episodes"):
        write_episodes(tmp_path / "data", [])
    assert os.listdir(tmp_path) == []
    good = make_episode([0, 1, 4])
    for bad, message in [
        (make_episode([0, 1, 4], num_actions=np.zeros(2, np.int32)), r"num_actions has shape \(2,"),
        (make_episode([0, 4], images={"agentview": good.images["agentview"][:2]}), "wrist"),
        (make_episode([0, 3, 2]), "timesteps must increase"),
        (make_episode([0, 4], length=5), "end at its length 5"),
    ]:
        with pytest.raises(ValueError, match=f"episode 1 cannot be stored.*{message}"):
            write_episodes(tmp_path / "data", [good, bad])
        assert os.listdir(tmp_path) == []


def test_never_overwrites(tmp_path, make_episode):
    write_episodes(tmp_path / "data", [make_episode([0, 1])])
    with pytest.raises(ValueError, match="already exists"):
        write_episodes(tmp_path / "data", [make_episode([0, 1]), make_episode([0, 1])])
    assert len(read_episodes(tmp_path / "data")) == 1


def flip(data, position):
    return (
        data[:position]
        + bytes(b ^ 255 for b in data[position : position + 8])
        + data[position + 8 :]
    )


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data[:65536],
        lambda data: data[:-1],
        lambda data: flip(data, 100),
        lambda data: flip(data, 20_000),
    ],
    ids=["empty", "half", "one_block", "last_byte", "bits_in_header", "bits_in_image"],
)
def test_damaged_records(tmp_path, make_episode, damage):
    # Noise does not compress, so the records really fill the file's first block.
    noise = np.random.default_rng(0).integers(0, 256, (2, 96, 96, 3), np.uint8)
    episodes = [make_episode([0, 1], images={"agentview": noise}) for _ in range(6)]
    write_episodes(tmp_path / "data", episodes)
    (file,) = (tmp_path / "data").glob("*array_record*")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match=r"array_record.* is corrupt.*delete the directory .*data"):
        read_episodes(tmp_path / "data")


def test_records_of_another_dataset(tmp_path, make_episode):
    write_episodes(tmp_path / "two", [make_episode([0, 1])] * 2)
    write_episodes(tmp_path / "one", [make_episode([0, 1])])
    (one,), (two,) = ((tmp_path / name).glob("*array_record*") for name in ("one", "two"))
    two.write_bytes(one.read_bytes())
    with pytest.raises(ValueError, match=r"array_record.*1 records, expected 2"):
        read_episodes(tmp_path / "two")


def test_full_disk(tmp_path, make_episode, monkeypatch):
    def full(self):
        raise RuntimeError("write() failed: No space left on device; writing x; at byte 3145728")

    monkeypatch.setattr(RobotEpisodes, "download_and_prepare", full)
    with pytest.raises(OSError, match=r"No space left on device: .*data") as caught:
        write_episodes(tmp_path / "data", [make_episode([0, 1])])
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["features.json", "dataset_info.json", "array_record"])
def test_missing_or_garbled_file(tmp_path, make_episode, name):
    write_episodes(tmp_path / "data", [make_episode([0, 1])])
    (file,) = (tmp_path / "data").glob(f"*{name}*")
    file.write_text("{")
    with pytest.raises(ValueError, match=r"is corrupt or truncated.*delete the directory"):
        read_episodes(tmp_path / "data")
    file.unlink()
    with pytest.raises(ValueError, match=r"is corrupt or truncated.*delete the directory"):
        read_episodes(tmp_path / "data")


def test_a_path_that_is_no_dataset_is_not_to_be_deleted(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path):
        with pytest.raises(ValueError, match="no dataset") as error:
            read_episodes(path)
        assert "delete" not in str(error.value)
