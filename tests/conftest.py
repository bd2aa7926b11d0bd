"""Settings of the whole suite."""

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
    """Most of the suite's time is XLA compiling small programs that run once or twice, so it skips
    most optimisations, except in tests marked `trains`, which run theirs hundreds of times."""
    jax.config.update("jax_disable_most_optimizations", "trains" not in request.keywords)


# The longest files, first, so that no worker is left alone with one of them at the end.
LONGEST = (
    "test_pipeline.py",
    "test_fidelity.py",
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
