import struct

import numpy as np
import pytest

from mbpo_jax.data.formats.conversion import convert
from mbpo_jax.data.formats.recording import Names

pytest.importorskip("google_crc32c", reason="no google-crc32c: pip install -e '.[import]'")
from mbpo_jax.data.formats.rlds import entries
from tests.recordings import Truth, encoded, rlds_record, write_tfrecord


@pytest.fixture
def shard(tmp_path):
    """A file of three episodes of 14, 15 and 16 observations."""
    truths = [Truth(14 + i) for i in range(3)]
    return write_tfrecord(
        tmp_path / "libero-train.tfrecord-00000-of-00001", map(rlds_record, truths)
    ), truths


def test_values_and_order(tmp_path, shard, layout, names, assert_is_truth):
    path, truths = shard
    found = entries(tmp_path, names)
    assert [e.name for e in found] == [f"{path.name}:{i}" for i in range(3)]
    for entry, truth in zip(found, truths):
        recording = entry.read()
        assert recording.success is True
        _, episode = convert(entry.name, recording, layout)
        assert_is_truth(episode, truth)


def test_truncated_file_loses_only_the_cut_record(shard, names):
    path, truths = shard
    path.write_bytes(path.read_bytes()[:-40])
    found = entries(path, names)
    assert len(found) == 3
    assert len(found[1].read().actions) == truths[1].steps
    with pytest.raises(ValueError, match="truncated in the record at byte"):
        found[2].read()


def test_flipped_bits(shard, names):
    path, _ = shard
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    found = entries(path, names)
    with pytest.raises(ValueError, match="corrupt in the record at byte 0: wrong checksum"):
        found[0].read()
    found[1].read()


def test_damaged_length_hides_what_follows(shard, names):
    path, _ = shard
    data = bytearray(path.read_bytes())
    second = 8 + 4 + struct.unpack("<Q", data[:8])[0] + 4
    data[second] ^= 1
    path.write_bytes(data)
    first, damaged = entries(path, names)
    first.read()
    with pytest.raises(ValueError, match=f"corrupt at byte {second}.*whatever follows"):
        damaged.read()


def test_empty_file(tmp_path, names):
    path = tmp_path / "a.tfrecord"
    path.touch()
    (entry,) = entries(path, names)
    with pytest.raises(ValueError, match="truncated at byte 0"):
        entry.read()


def test_contradicting_features(tmp_path, layout, names):
    truth = Truth()
    gray = [encoded(frame[..., 0]) for frame in truth.images["agentview"]]
    records = [
        rlds_record(truth, **{"steps/action": truth.actions.ravel()[:-1]}),
        rlds_record(truth, **{"steps/observation/image": gray}),
        rlds_record(truth, **{"steps/observation/wrist_image": gray[:5]}),
        rlds_record(truth, **{"steps/observation/image": [b"no image"] * truth.steps}),
        b"no example",
    ]
    action, mode, count, corrupt, nothing = entries(
        write_tfrecord(tmp_path / "a.tfrecord", records), names
    )
    with pytest.raises(ValueError, match="action: it has 97 numbers for 14 steps"):
        action.read()
    for entry, message in [
        (mode, "mode L, expected 8-bit RGB"),
        (count, "5 texts or images for 14 steps"),
        (corrupt, "an image is corrupt"),
    ]:
        facts, _ = convert("a", entry.read(), layout)
        assert any(message in problem for problem in facts.problems), message
    with pytest.raises(ValueError, match=r"no tf\.train\.Example|no field"):
        nothing.read()


def test_not_a_dataset(tmp_path, names):
    with pytest.raises(ValueError, match="is not an RLDS dataset"):
        entries(tmp_path, names)


def test_where_the_instruction_is_from(tmp_path, names):
    texts = {"steps/note": [b"open the door"] * 14, "steps/language_instruction": [b""] * 14}
    path = write_tfrecord(tmp_path / "a.tfrecord", [rlds_record(Truth(), **texts)])
    (entry,) = entries(path, Names(names.cameras, {"note": "instruction"}))
    assert entry.read().instruction == "open the door"
    (entry,) = entries(path, Names(names.cameras, {}, {"instruction": "close the door"}))
    assert entry.read().instruction == "close the door"
    assert len(entry.read().actions) == 14


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("language_instruction", [b"\xff"] * 14),
        ("language_instruction", [b"one", b"two"] * 7),
        ("language_instruction", np.zeros(14, int)),
        ("language_instruction", []),
        ("action", [b"text"] * 14),
        ("action", []),
        ("action", np.full(14 * 7, np.nan)),
        ("observation/state", np.zeros(5)),
        ("observation/image", np.zeros(14)),
        ("reward", np.linspace(0, 1, 14)),
        ("reward", np.full(14, np.nan)),
    ],
)
def test_a_bad_feature_is_a_problem_of_its_episode(tmp_path, layout, names, key, values):
    records = [rlds_record(Truth()), rlds_record(Truth(), **{f"steps/{key}": values})]
    good, bad = entries(write_tfrecord(tmp_path / "a.tfrecord", records), names)
    assert convert("good", good.read(), layout)[0].problems == []
    try:
        problems = convert("bad", bad.read(), layout)[0].problems
    except ValueError as error:
        problems = [str(error)]
        assert "a.tfrecord" in problems[0]
    assert key in problems[0]


def test_a_file_that_cannot_be_opened(tmp_path, layout, names):
    (tmp_path / "a.tfrecord").symlink_to("nowhere")
    write_tfrecord(tmp_path / "b.tfrecord", [rlds_record(Truth())])
    bad, good = entries(tmp_path, names)
    assert convert("good", good.read(), layout)[0].problems == []
    with pytest.raises(ValueError, match=r"a\.tfrecord"):
        bad.read()
