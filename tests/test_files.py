import json

import pytest

from mbpo_jax.files import atomic_write, write_json


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "done.json"
    write_json(path, {"minutes": 1.5})
    with atomic_write(path) as file:
        file.write("[2]")
        file.flush()
        assert json.loads(path.read_text()) == {"minutes": 1.5}
    assert json.loads(path.read_text()) == [2]
    assert list(tmp_path.iterdir()) == [path]


def test_writing_that_fails_leaves_what_there_was(tmp_path):
    path = tmp_path / "part.npz"
    path.write_bytes(b"before")

    def stopped():
        with atomic_write(path, "wb") as file:
            file.write(b"half of it")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert path.read_bytes() == b"before"
