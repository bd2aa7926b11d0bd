"""Seeds of a run: one for every use of random numbers, and one for every random reset."""

import hashlib

STREAMS = (
    "acting",
    "autoencoder",
    "autoencoder_batches",
    "dynamics",
    "dynamics_batches",
    "dynamics_members",
    "expected_return",
    "fidelity",
    "fidelity_study",
    "imagined_imitation",
    "imagined_imitation_starts",
    "imagined_success",
    "imitation",
    "imitation_batches",
    "improve",
    "improve_anchors",
    "improve_batches",
    "improve_encoding",
    "improve_starts",
    "offline_critics",
    "policy_init",
    "progress",
    "reward_batches",
    "sft",
    "sft_batches",
    "siblings",
    "value",
    "value_imagination",
    "view",
    "world_model_init",
)

# Random resets are numbered, so that a recorded episode can be repeated: a million for every seed,
# in which each stage begins at its own number. The evaluation's are the same for every seed.
RESETS_PER_SEED = 1_000_000
FIRST_RESET = {"demonstrations": 0, "rollouts": 50_000, "evaluation": 900_000}
LARGEST_SEED = 1000  # every reset is below 2^30, which the simulators' generators can take


def stream(seed: int, name: str) -> int:
    """The seed, from 0 to 2^31 - 1, of what `name` (one of `STREAMS`) draws in a run with `seed`.

    It is a hash of both: neighbouring seeds share no stream, and a new name changes no other.

    Raises:
        ValueError: an unknown name.
    """
    if name not in STREAMS:
        raise ValueError(f"there is no stream {name!r} of random numbers; add it to STREAMS")
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:4]) >> 1


def reset(seed: int, stage: str, number: int) -> int:
    """The seed of the random reset `number` of a stage in a run with `seed`."""
    before = 0 if stage == "evaluation" else seed * RESETS_PER_SEED
    return before + FIRST_RESET[stage] + number
