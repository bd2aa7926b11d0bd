"""Settings of the whole suite."""

import jax
import pytest


@pytest.fixture(autouse=True)
def fast_compilation(request):
    """Most of the suite's time is XLA compiling small programs that run once or twice, so it skips
    most optimisations, except in tests marked `trains`, which run theirs hundreds of times."""
    jax.config.update("jax_disable_most_optimizations", "trains" not in request.keywords)
