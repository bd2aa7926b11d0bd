import pytest

from mbpo_jax.data.spool import EpisodeSpool


def test_round_trip(tmp_path, make_episode, assert_same_episode):
    spool = EpisodeSpool(tmp_path / "spool")
    episodes = {"b-1": make_episode([0, 4, 5]), "a-2": make_episode([0], success=False, seed=1)}
    for name, episode in episodes.items():
        spool.add(name, episode)
    again = EpisodeSpool(tmp_path / "spool")
    assert again.names() == ["a-2", "b-1"]
    for name, episode in episodes.items():
        assert_same_episode(again.load(name), episode)


def test_stopped_add_leaves_nothing(tmp_path, make_episode, monkeypatch):
    spool = EpisodeSpool(tmp_path)

    def stop(file, **content):
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr("numpy.savez_compressed", stop)
    with pytest.raises(KeyboardInterrupt):
        spool.add("a", make_episode([0, 1]))
    assert spool.names() == []
    assert list(tmp_path.iterdir()) == []


def test_corrupt_and_missing(tmp_path, make_episode):
    spool = EpisodeSpool(tmp_path)
    spool.add("a", make_episode([0, 1]))
    file = tmp_path / "a.npz"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"a\.npz is corrupt.*delete this file"):
        spool.load("a")
    with pytest.raises(ValueError, match="no episode 'b'"):
        spool.load("b")
