"""Image and answer metrics by hand; the baselines of fidelity and horizon."""

import jax
import numpy as np

from mbpo_jax.world_model import metrics

from .conftest import CAMERAS, make_transition


class CopyWorld:
    """Imagines that nothing happens."""

    def step(self, params, observation, actions, key):
        return observation


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
    assert {k: round(v, 9) for k, v in found.items()} == {
        k: round(v, 9) for k, v in expected.items()
    }
    assert metrics.classification([0.1], [0])["f1"] == 0.0


def test_copying_scores_as_the_baseline():
    transitions = make_transition(batch=(5,))
    report = metrics.fidelity(CopyWorld(), {}, transitions, jax.random.key(0), batch_size=2)
    for camera in CAMERAS:
        scores = report[camera]
        now, later = transitions.observation.images[camera], transitions.next_images[camera]
        np.testing.assert_allclose(scores["psnr"], metrics.psnr(now, later).mean(), rtol=1e-5)
        assert scores["psnr"] == scores["copy_psnr"]
        assert scores["ssim"] == scores["copy_ssim"]


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
