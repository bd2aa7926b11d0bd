"""One simulator of a kind for all tests of this folder: making one costs seconds."""

import importlib.util
import textwrap

import pytest

HAS_LIBERO = importlib.util.find_spec("libero") is not None


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="libero is not installed: pip install -e '.[libero]'")
    for item in items:
        if "libero" in item.keywords and not HAS_LIBERO:
            item.add_marker(skip)


# A stand-in for the worker program: episodes without a simulator, and accidents on demand. An
# accident happens once for each file that does not exist yet, named by the seed.
FAKE_WORKER = """
    import os, sys, time
    from multiprocessing.connection import Connection
    from pathlib import Path
    import numpy as np
    from mbpo_jax.envs.requests import EpisodeResult, Failure, Query

    folder = Path(__file__).parent
    connection = Connection(int(sys.argv[1]))
    connection.recv()
    while True:
        try:
            job = connection.recv()
        except EOFError:
            break
        seed, attempt = job.request.seed, folder / str(job.request.seed)
        first = not attempt.exists()
        attempt.write_text(attempt.read_text() + "x" if attempt.exists() else "x")
        if seed == 100 and first or seed == 300:
            print("a segmentation fault", file=sys.stderr, flush=True)
            os._exit(17)
        if seed == 200 and first:
            time.sleep(3600)
        if seed == 400:
            connection.send(Failure("the goal is unknown"))
            continue
        if seed == 500:
            raise OSError("the disk is on fire")
        total = 0.0
        if job.source is not None:
            for index in range(3):
                connection.send(Query(job.request, index, {}, np.full(8, seed, np.float32)))
                total += float(connection.recv().sum())
        (folder / f"host{os.environ.get('RAY_RAYLET_PID', '')}").touch()
        connection.send(EpisodeResult(job.request, total, None, 0.0))
"""


@pytest.fixture
def fake_workers(tmp_path, monkeypatch):
    program = tmp_path / "worker.py"
    program.write_text(textwrap.dedent(FAKE_WORKER))
    monkeypatch.setattr("mbpo_jax.envs.workers.local_workers.WORKER_COMMAND", (str(program),))
    monkeypatch.setattr("mbpo_jax.envs.suites.task_info", lambda *_: None)


@pytest.fixture(scope="session")
def book_env():
    from mbpo_jax.envs.sim.libero import LiberoEnv

    env = LiberoEnv("libero_10", 5, image_size=64)
    yield env
    env.close()


@pytest.fixture(scope="session")
def lift_env():
    from mbpo_jax.envs.sim.two_arm_lift import TwoArmLiftEnv

    env = TwoArmLiftEnv(image_size=32)
    yield env
    env.close()
