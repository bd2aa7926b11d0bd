"""Settings of the whole suite."""

import atexit
import os
import shutil
import tempfile

# Most of the suite's time is XLA compiling small programs that run once or twice. What one process
# has compiled the others read, and XLA's former code generator for fusions takes half as long as
# the default one. Set before JAX is imported, also for the processes that tests start.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = tempfile.mkdtemp(prefix="compiled-")
    atexit.register(shutil.rmtree, compiled, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false"
    )

import jax
import pytest
from jaxtyping import install_import_hook

from tests import array_annotations

# Before anything imports the package: in tests, what its functions say of arrays is checked. The
# other folders say nothing of shapes, and would only start more slowly.
CHECKED = ("mbpo", "nn", "policy", "world_model")
install_import_hook(
    [*(f"mbpo_jax.{name}" for name in CHECKED), "experiments.theory"],
    f"{array_annotations.__name__}.checked",
)


@pytest.fixture(autouse=True)
def fast_compilation(request):
    """XLA skips most optimisations, except in tests marked `trains`: they run theirs many times."""
    jax.config.update("jax_disable_most_optimizations", "trains" not in request.keywords)


# The longest files, first, so that no worker is left alone with one of them at the end.
LONGEST = (
    "test_pipeline.py",
    "test_fidelity.py",
    "test_learning.py",
    "test_umm_world.py",
    "test_sharding.py",
    "test_pi0.py",
    "test_data.py",
    "test_bagel.py",
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONGEST)))
