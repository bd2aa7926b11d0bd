"""No two uses of random numbers, of any two runs, draw the same."""

import pytest

from mbpo_jax.seeds import FIRST_RESET, LARGEST_SEED, STREAMS, reset, stream


def test_streams_of_neighbouring_seeds_are_distinct():
    found = [stream(seed, name) for seed in range(51) for name in STREAMS]
    following = {x + 1 for x in found}  # a second source of batches takes the next number
    assert len(set(found)) == len(found)
    assert not following & set(found)
    assert all(0 <= x < 2**31 for x in found)


def test_streams_are_the_same_on_every_machine():
    assert stream(0, "sft") == 1220777870
    assert stream(7, "improve") == 1941759381


def test_an_unknown_stream_is_named():
    with pytest.raises(ValueError, match="rolouts"):
        stream(0, "rolouts")


def test_resets_of_stages_and_seeds_are_distinct():
    stages = ("demonstrations", "rollouts")
    found = [reset(seed, stage, i) for seed in range(51) for stage in stages for i in range(200)]
    found += [reset(0, "evaluation", i) for i in range(200)]
    assert len(set(found)) == len(found)
    assert reset(3, "evaluation", 5) == 900_005
    assert reset(LARGEST_SEED, "rollouts", 900_000) < 2**30
    assert list(FIRST_RESET.values()) == sorted(FIRST_RESET.values())
