"""Image and answer metrics by hand; the baselines of fidelity and horizon."""

import jax
import numpy as np

from mbpo_jax.types import WorldState
from mbpo_jax.world_model import metrics

from .conftest import CAMERAS, make_transition


class CopyWorld:
    """Imagines that nothing happens."""

    def encode(self, params, observation, key, precomputed=None):
        return WorldState(observation)

    def step(self, params, state, actions, key):
        return state


def test_psnr_by_hand():
    # A constant error of 51 of 255 is 0.2: MSE 0.04, PSNR 10 log10(25) = 13.9794 dB.
    image = np.full((2, 12, 12, 3), 100, np.uint8)
    np.testing.assert_allclose(metrics.psnr(image, image + 51), [13.9794, 13.9794], atol=1e-4)
    np.testing.assert_allclose(metrics.psnr(image, image), [100.0, 100.0], atol=1e-4)


def test_ssim_by_hand():
    # Constant images: the variances vanish, SSIM = (2 a b + C1) / (a^2 + b^2 + C1).
    a, b = np.full((1, 16, 16, 3), 51.0), np.full((1, 16, 16, 3), 102.0)
    expected = (2 * 0.2 * 0.4 + 1e-4) / (0.04 + 0.16 + 1e-4)
    np.testing.assert_allclose(metrics.ssim(a, b), [expected], atol=1e-4)
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (1, 16, 16, 3))
    np.testing.assert_allclose(metrics.ssim(noise, noise), [1.0], atol=1e-5)


def test_classification_by_hand():
    # 2 hits, 1 false alarm, 1 miss, 1 correct rejection.
    found = metrics.classification([0.9, 0.6, 0.8, 0.1, 0.2], [1, 1, 0, 1, 0])
    expected = {"accuracy": 3 / 5, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3}
    expected |= {"frames": 5, "yes_frames": 3}
    assert {k: round(v, 9) for k, v in found.items()} == {
        k: round(v, 9) for k, v in expected.items()
    }
    assert metrics.classification([0.1], [0])["f1"] == 0.0


def test_f1_interval_draws_whole_episodes():
    # Episode 4 is all hits, episode 7 all misses: draws of two give F1 1 (both times 4), 2/3 (one
    # of each: 2 hits, 2 claimed, 4 actual) or 0 (both times 7), each extreme in 1/4 of them.
    probability, label, episode = [0.9, 0.9, 0.1, 0.1], [1, 1, 1, 1], [4, 4, 7, 7]
    assert metrics.f1_interval(probability, label, episode) == (0.0, 1.0)
    # Frames alone would nearly never be all of one kind, and episodes alike have no spread.
    np.testing.assert_allclose(
        metrics.f1_interval([0.9, 0.1] * 20, [1] * 40, np.repeat(np.arange(20), 2)), 2 / 3
    )


def test_copying_scores_as_the_baseline():
    transitions = make_transition(batch=(5,))
    imagined = metrics.imagine_chunk(CopyWorld(), {}, transitions, jax.random.key(0), batch_size=2)
    report = metrics.fidelity(transitions, imagined.images, batch_size=2)
    for camera in CAMERAS:
        scores = report[camera]
        now, later = transitions.observation.images[camera], transitions.next_images[camera]
        np.testing.assert_allclose(scores["psnr"], metrics.psnr(now, later).mean(), rtol=1e-5)
        assert scores["psnr"] == scores["copy_psnr"]
        assert scores["ssim"] == scores["copy_ssim"]
    proprio = metrics.proprio_error(transitions, imagined.proprio)
    moved = np.abs(transitions.next_proprio - transitions.observation.proprio)
    np.testing.assert_allclose(proprio["copy_error"], moved.mean(0), rtol=1e-6)
    assert proprio["error"] == proprio["copy_error"]


def test_horizon_compares_with_each_frame():
    transition = make_transition(batch=(2,))
    start, later = transition.observation.images, transition.next_images
    images = {c: np.stack([start[c], later[c]]) for c in CAMERAS}
    chunks = np.stack([transition.actions] * 2)
    imagined = metrics.imagine_open_loop(
        CopyWorld(), {}, transition.observation, chunks, jax.random.key(0)
    )
    curve = metrics.horizon_curve(start, imagined, images)
    for camera in CAMERAS:
        expected = [100.0, float(metrics.psnr(start[camera], later[camera]).mean())]
        np.testing.assert_allclose(curve[camera]["psnr"], expected, rtol=1e-5)
        np.testing.assert_allclose(curve[camera]["copy_psnr"], expected, rtol=1e-5)


def test_calibration_by_hand():
    # Two bins: 0.2 and 0.4 with one "Yes" of two (gap 0.2), 0.9 with a "Yes" (gap 0.1).
    found = metrics.calibration([0.2, 0.4, 0.9], [0, 1, 1], bins=2)
    np.testing.assert_allclose(found["calibration_error"], (2 * 0.2 + 0.1) / 3, atol=1e-9)
    np.testing.assert_allclose(found["bin_probability"], [0.3, 0.9])
    np.testing.assert_allclose(found["bin_yes_share"], [0.5, 1.0])
    assert found["bin_count"] == [2, 1]
    assert metrics.calibration([1.0], [1])["bin_count"][-1] == 1


def test_motion_is_sorted_by_the_real_change():
    current = np.full((10, 2, 2, 3), 100, np.uint8)
    real = np.array([5, 1, 9, 3, 7, 2, 8, 4, 6, 10], np.uint8)
    truth = current + real[:, None, None, None]
    imagined = current + (real // 2)[:, None, None, None]
    found = metrics.motion_by_decile(current, imagined, truth)
    np.testing.assert_array_equal(found["real"], np.arange(1, 11))
    np.testing.assert_array_equal(found["imagined"], np.arange(1, 11) // 2)


def test_a_probe_reads_where_a_square_is():
    rng = np.random.default_rng(0)
    places = rng.integers(0, 52, (400, 2))
    images = rng.integers(0, 20, (400, 64, 64, 3)).astype(np.uint8)
    for image, (row, column) in zip(images, places):
        image[row : row + 12, column : column + 12] = 200
    read = metrics.fit_probe(images[:360], places[:360] + 100.0)
    assert np.abs(read(images[360:]) - 100.0 - places[360:]).mean() < 2.0
    np.testing.assert_allclose(read(images[:5]), places[:5] + 100.0, atol=1.0)


def test_what_came_into_view_is_told_apart():
    rng = np.random.default_rng(0)
    scene = rng.integers(0, 256, (64, 96, 3)).astype(np.uint8)
    current, truth = scene[None, :, :64], scene[None, :, 16:80]  # the camera moved by 16 pixels
    # Two of the eight columns of patches are new. The imagined frame is wrong by 8 there only.
    imagined = truth.astype(np.int16)
    imagined[:, :, 48:] += np.where(imagined[:, :, 48:] < 128, 8, -8)
    found = metrics.out_of_view(current, imagined.astype(np.uint8), truth)
    np.testing.assert_allclose(found["unseen_share"], 0.25, atol=1e-6)
    np.testing.assert_allclose((found["seen_rms"], found["unseen_rms"]), (0.0, 8.0), atol=1e-4)
    still = metrics.out_of_view(current, current, current)
    assert still == {"unseen_share": 0.0, "seen_rms": 0.0, "unseen_rms": None}
