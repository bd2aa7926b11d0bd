import contextlib
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mbpo_jax.training.checkpoints import Checkpoints, best_state, load_params, save_params

ORIGIN = {"config": {"rl.discount": 0.9, "rl.updates": 5}, "seed": 1}


def state(value: float, size: int = 8):
    return {
        "params": {"actor": {"w": jnp.full(size, value)}, "critic": {"w": jnp.full(3, -value)}},
        "step": jnp.asarray(int(value), jnp.int32),
    }


def assert_state(found, value, size=8):
    jax.tree.map(np.testing.assert_array_equal, found, state(value, size))


def test_a_state_outlives_the_donation_of_its_arrays(tmp_path):
    count = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    arrays = count(state(0.0, size=300_000))
    expected = jax.tree.map(np.array, arrays)
    with Checkpoints(tmp_path, ORIGIN) as checkpoints:
        progress = {"window": []}
        checkpoints.save(1, arrays, progress)
        for _ in range(5):
            arrays = count(arrays)
            progress["window"].append(1.0)
        checkpoints.wait()
        found, progress = checkpoints.restore(arrays)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert progress == {"window": []}


def test_the_newest_and_the_best_are_kept(tmp_path):
    success = {1: 0.2, 2: 0.9, 3: 0.4, 4: 0.6, 5: 0.1}
    with Checkpoints(tmp_path, ORIGIN, keep=2, best="success") as checkpoints:
        for step, value in success.items():
            checkpoints.save(step, state(step), metrics={"success": value})
        checkpoints.save(6, state(6))  # not evaluated: neither the best nor in its way
    with Checkpoints(tmp_path, ORIGIN, keep=2, best="success") as checkpoints:
        assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["2", "5", "6"]
        assert checkpoints.latest_step() == 6
        assert_state(checkpoints.restore(state(0))[0], 6)
        assert_state(checkpoints.restore(state(0), step=2)[0], 2)


def test_the_best_parameters_are_read_from_a_state(tmp_path):
    with Checkpoints(tmp_path / "checkpoints", best="success") as checkpoints:
        for step, value in {1: 0.9, 2: 0.4}.items():
            whole = {"state": state(step), "branch": jnp.zeros(2)}
            checkpoints.save(step, whole, metrics={"success": value})
    best = best_state(tmp_path / "checkpoints", "success")
    assert best.parent.name == "1"
    found = load_params(best, state(0)["params"])
    jax.tree.map(np.testing.assert_array_equal, found, state(1)["params"])


def test_without_an_evaluated_state_there_is_no_best(tmp_path):
    with pytest.raises(FileNotFoundError, match="success"):
        best_state(tmp_path / "nowhere", "success")
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state(1))
    with pytest.raises(FileNotFoundError, match="success"):
        best_state(tmp_path, "success")


def test_another_origin_is_refused_with_what_differs(tmp_path):
    with Checkpoints(tmp_path, ORIGIN) as checkpoints:
        checkpoints.save(3, state(3))
    other = {"config": {"rl.discount": 0.99, "rl.updates": 5}, "seed": 2}
    with Checkpoints(tmp_path, other) as checkpoints:
        with pytest.raises(ValueError, match=r"(?s)step 3 .* another run") as refusal:
            checkpoints.restore(state(0))
        lines = str(refusal.value).splitlines()[1:-1]
        assert lines == ["  config.rl.discount: 0.9 there, 0.99 now", "  seed: 1 there, 2 now"]


ON_EIGHT_DEVICES = """
    import sys
    import jax
    import numpy as np
    from mbpo_jax.training.checkpoints import Checkpoints
    from mbpo_jax.training.sharding import make_mesh, parameter_sharding

    arrays = {"w": np.arange(2**19, dtype=np.float32).reshape(512, 1024), "b": np.ones(3)}
    rules = [("w", (-2,))]
    (split, whole) = (parameter_sharding(arrays, make_mesh(fsdp), rules) for fsdp in (4, 1))
    arrays = jax.device_put(arrays, split)
    assert arrays["w"].addressable_shards[0].data.size == 2**17
    with Checkpoints(sys.argv[1]) as checkpoints:
        checkpoints.save(1, arrays)
        checkpoints.wait()
        found, _ = checkpoints.restore(jax.device_put(arrays, whole))
        assert found["w"].sharding == whole["w"]
        jax.tree.map(np.testing.assert_array_equal, found, arrays)
    assert jax.device_count() == 8
"""


def test_a_state_is_restored_onto_another_mesh(tmp_path):
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    program = textwrap.dedent(ON_EIGHT_DEVICES)
    subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], env={**os.environ, **flags}, check=True
    )
    like = {"w": jnp.zeros((512, 1024)), "b": jnp.zeros(3)}
    with Checkpoints(tmp_path) as checkpoints:
        found, _ = checkpoints.restore(like)
    assert len(found["w"].devices()) == 1
    np.testing.assert_array_equal(found["w"], np.arange(2**19).reshape(512, 1024))


@contextlib.contextmanager
def largest_file(size: int):
    """Writing more than `size` bytes to a file fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_during_a_save_keeps_the_state_before(tmp_path):
    noise = jax.random.normal(jax.random.key(0), (500_000,))  # random, as zeros are compressed
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": jnp.ones(4)})
        checkpoints.wait()
        with largest_file(100_000):
            checkpoints.save(2, {"w": noise})
            with pytest.raises(OSError, match=r"cannot save .*step 1 is kept; free some space"):
                checkpoints.wait()
        np.testing.assert_array_equal(checkpoints.restore({"w": jnp.zeros(4)})[0]["w"], np.ones(4))
    with Checkpoints(tmp_path, keep=2) as checkpoints:  # nothing is left in the way
        checkpoints.save(2, {"w": noise})
    assert checkpoints.latest_step() == 2


def test_a_full_disk_is_noticed_before_writing(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 2**20})
    monkeypatch.setattr("mbpo_jax.training.checkpoints.shutil.disk_usage", lambda path: usage)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state(1))
        with pytest.raises(OSError, match=r"8 MiB are needed .*step 1 is kept"):
            checkpoints.save(2, state(2, size=2**21))


@contextlib.contextmanager
def without_privileges():
    """Root may write anywhere, so it acts as nobody."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_read_only_directory_keeps_the_state_before():
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        with Checkpoints(directory) as checkpoints:
            checkpoints.save(1, state(1))
            checkpoints.wait()
            Path(directory).chmod(0o555)
            with (
                without_privileges(),
                pytest.raises(OSError, match=r"Permission denied.*step 1 is kept"),
            ):
                checkpoints.save(2, state(2))
            assert_state(checkpoints.restore(state(0))[0], 1)
        Path(directory).chmod(0o755)


def test_parameters_round_trip(tmp_path):
    params = {"a": {"b": jnp.arange(6.0).reshape(2, 3)}, "c": jnp.ones(2, jnp.int32)}
    save_params(tmp_path / "p", params)
    again = load_params(tmp_path / "p", jax.tree.map(jnp.zeros_like, params))
    jax.tree.map(np.testing.assert_array_equal, params, again)
    with pytest.raises(FileNotFoundError, match="run the stage"):
        load_params(tmp_path / "absent", params)


def lose(path):
    path.unlink()


def empty(path):
    path.write_bytes(b"")


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def replace(path):
    path.write_bytes(b"<!DOCTYPE html><html>403 Forbidden</html>")


def garble(path):
    path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


DAMAGES = (lose, empty, cut, replace, garble)


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_parameters_are_refused_or_not_needed(tmp_path, damage):
    """A file of an Orbax folder that is damaged is one message that names the folder, unless the
    parameters can be had without it: never others, never another exception."""
    rng = np.random.default_rng(0)
    params = {"a": {"w": rng.normal(size=(200, 200)).astype(np.float32)}, "b": np.ones(3)}
    save_params(tmp_path / "whole", params)
    files = [path for path in (tmp_path / "whole").rglob("*") if path.is_file()]
    refused = []
    for number, file in enumerate(files):
        broken = tmp_path / f"broken_{number}"
        shutil.copytree(tmp_path / "whole", broken)
        damage(broken / file.relative_to(tmp_path / "whole"))
        try:
            found = load_params(broken, params)
        except ValueError as error:
            assert str(broken) in str(error)  # noqa: PT017
            refused.append(file)
        else:
            jax.tree.map(np.testing.assert_array_equal, found, params)
    largest = max(files, key=lambda path: path.stat().st_size)
    assert {largest, tmp_path / "whole" / "_METADATA"} <= set(refused)


def test_parameters_that_are_not_finite_are_named(tmp_path):
    params = {"a": {"w": jnp.array([1.0, jnp.nan])}, "b": jnp.ones(2)}
    save_params(tmp_path / "p", params)
    with pytest.raises(ValueError, match=r"array a\.w .*not finite"):
        load_params(tmp_path / "p", params)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("item", ["state", "record"])
def test_a_damaged_state_says_what_to_delete(tmp_path, item, damage):
    with Checkpoints(tmp_path, ORIGIN) as checkpoints:
        checkpoints.save(3, state(3.0, size=5000))
        checkpoints.wait()
        files = [path for path in (tmp_path / "3" / item).rglob("*") if path.is_file()]
        damage(max(files, key=lambda path: (path.suffix == "", path.stat().st_size)))
        with pytest.raises(ValueError, match=r"incomplete or corrupt") as error:
            checkpoints.restore(state(0.0, size=5000))
    assert f"delete {tmp_path / '3'}" in str(error.value)
