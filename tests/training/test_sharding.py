"""Any mesh computes what one device computes."""

import json
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from configs.libero_long import get_config
from mbpo_jax.policy.config import variants
from mbpo_jax.policy.pi0 import FlowPolicy
from mbpo_jax.training.checkpoints import Checkpoints
from mbpo_jax.training.metrics import read_metrics
from mbpo_jax.training.sharding import frozen_weight_sharding, map_rows, parameter_sharding
from tests.policy.conftest import stats
from tests.training.sharded_steps import TRAININGS, flat, network_steps, toy_runs

# Sums over a batch are taken in another order on every mesh: float32 differs in the last places.
RELATIVE, ABSOLUTE = 2e-4, 2e-5
TOYS = ("4x2", "1x8", "pmap")


def run(*arguments) -> subprocess.Popen:
    """The program of `sharded_steps`, with devices of its own."""
    command = [sys.executable, "-m", "tests.training.sharded_steps", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(*processes: subprocess.Popen) -> None:
    for process in processes:
        output, _ = process.communicate(timeout=500)
        assert process.returncode == 0, output[-3000:]


def computed_by_eight(directory, **options) -> dict:
    finish(run(directory, *[f"--{name}={value}" for name, value in options.items()]))
    return dict(np.load(directory / "results.npz"))


@pytest.fixture(scope="module")
def eight_devices(tmp_path_factory) -> dict:
    directory = tmp_path_factory.mktemp("eight")
    return computed_by_eight(directory, toys=",".join(TOYS), networks="4x2", trainings="sft")


@pytest.fixture(scope="module")
def toys_on_one_device(tmp_path_factory) -> dict:
    return flat(toy_runs("1x1", tmp_path_factory.mktemp("one")))


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        other = found[name]
        if value.dtype == np.uint8:
            if "metrics" in name:
                value, other = numbers(value), numbers(other)
            else:  # images: a rounding may go the other way
                value, other = value.astype(int), other.astype(int)
                assert np.abs(value - other).max() <= 1, name
                continue
        np.testing.assert_allclose(other, value, RELATIVE, ABSOLUTE, err_msg=name)


def numbers(records: np.ndarray) -> np.ndarray:
    lines = [json.loads(line) for line in records.tobytes().decode().splitlines()]
    return np.asarray([number for line in lines for number in line.values()])


def part(results: dict, name: str) -> dict:
    start = f"{name}/"
    return {k.removeprefix(start): v for k, v in results.items() if k.startswith(start)}


def assert_networks_equal(results: dict, meshes: list[str], trainings: list[str]) -> None:
    expected = flat(network_steps("1x1", trainings))
    for mesh in meshes:
        found = {k: v for k, v in part(results, mesh).items() if not k.startswith("toy/")}
        assert_same(found, expected)
    gradients = [v for k, v in expected.items() if "gradient" in k]
    assert np.mean([np.abs(x).max() > 1e-3 for x in gradients]) > 0.8


def test_policy_training_and_branches_equal_one_device(eight_devices):
    assert_networks_equal(eight_devices, ["4x2"], ["sft"])


@pytest.mark.long
def test_all_steps_equal_one_device_on_every_mesh(tmp_path):
    meshes = ["8x1", "4x2", "2x4", "1x8", "pmap"]
    found = computed_by_eight(tmp_path, networks=",".join(meshes))
    assert_networks_equal(found, meshes, TRAININGS)


@pytest.mark.parametrize("mesh", TOYS)
def test_the_loops_equal_one_device(toys_on_one_device, eight_devices, mesh):
    assert_same(part(eight_devices, f"{mesh}/toy"), toys_on_one_device)


def run_two(*arguments) -> list[subprocess.Popen]:
    """Two processes with four devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = [*arguments, "--processes=2", f"--port={port}"]
    return [run(*shared, f"--process={i}") for i in range(2)]


def test_a_sigterm_to_one_process_stops_both_and_nothing_is_lost(tmp_path):
    processes = run_two(tmp_path, "--train=1000000")
    metrics = tmp_path / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size) and processes[0].poll() is None:
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    finish(*processes)
    with Checkpoints(tmp_path / "checkpoints", {"seed": 0}) as checkpoints:
        saved = checkpoints.latest_step()
    finish(*run_two(tmp_path, f"--train={saved + 2}"))
    assert [row["step"] for row in read_metrics(metrics)] == list(range(1, saved + 3))


def test_two_processes_equal_one(eight_devices, tmp_path):
    finish(*run_two(tmp_path, "--toys=4x2"))
    found = dict(np.load(tmp_path / "results.npz"))
    assert_same(part(found, "4x2/toy"), part(eight_devices, "4x2/toy"))


def mesh(data: int = 1, fsdp: int = 8) -> jax.sharding.AbstractMesh:
    types = (AxisType.Auto,) * 2
    return jax.sharding.AbstractMesh((data, fsdp), ("data", "fsdp"), axis_types=types)


def test_rules_split_the_named_dimensions():
    rules = get_config("micro").parallel.rules
    tree = {
        "mu": {
            "layers": {
                "q_einsum": {"w": np.zeros((3, 2, 16, 5))},
                "mlp": {"linear": np.zeros((3, 24, 8))},
            },
            "norm": {"scale": np.zeros(16)},
        },
        "odd": {"kernel": np.zeros((3, 9))},
        "wide": {"kernel": np.zeros((3, 8))},
    }
    specs = jax.tree.map(lambda s: s.spec, parameter_sharding(tree, mesh(), rules))
    assert specs == {
        "mu": {
            "layers": {
                "q_einsum": {"w": PartitionSpec(None, None, "fsdp", None)},
                "mlp": {"linear": PartitionSpec(None, "fsdp", None)},
            },
            "norm": {"scale": PartitionSpec(None)},
        },
        "odd": {"kernel": PartitionSpec(None, None)},
        "wide": {"kernel": PartitionSpec(None, "fsdp")},
    }


def test_nearly_all_of_the_full_size_policy_is_split():
    limits = [(-1.0, 1.0)] * 7
    policy = FlowPolicy(variants()["pi05"], stats(7), stats(8), ("agentview",), limits)
    shapes = jax.eval_shape(policy.init, jax.random.key(0))["actor"]
    split = parameter_sharding(shapes, mesh(), get_config("paper").parallel.rules)
    sizes = [x.size for x in jax.tree.leaves(shapes)]
    is_split = ["fsdp" in s.spec for s in jax.tree.leaves(split)]
    assert sum(sizes) > 3.3e9
    assert np.dot(sizes, is_split) > 0.995 * sum(sizes)


def test_unknown_placements_and_maps_are_refused():
    with pytest.raises(ValueError, match="'replicated', 'sharded' or 'offloaded'"):
        frozen_weight_sharding({}, mesh(), (), "cloud")
    with pytest.raises(ValueError, match="'shard_map' or 'pmap'"):
        map_rows(lambda x: x, mesh(), "vmap", (0,), 0)
