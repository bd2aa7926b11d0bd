"""The theory is checked in float64; the rest of the tests run in float32 in the same process."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def float64():
    with jax.enable_x64(True):
        yield
