"""One simulator for all tests of this folder: making one costs seconds."""

import importlib.util

import pytest

HAS_LIBERO = importlib.util.find_spec("libero") is not None


def pytest_collection_modifyitems(items):
    skip = pytest.mark.skip(reason="libero is not installed: pip install -e '.[libero]'")
    for item in items:
        if "libero" in item.keywords and not HAS_LIBERO:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def book_env():
    from mbpo_jax.envs.libero import LiberoEnv

    env = LiberoEnv("libero_10", 5, image_size=64)
    yield env
    env.close()
