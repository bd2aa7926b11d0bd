"""How well a world model imagines: image metrics, answer metrics, and error against horizon, beside
the baseline that copies the last frame."""

import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from mbpo_jax.shapes import Array, Float
from mbpo_jax.types import Observation, Params, Transition, WorldModel


def psnr(a: Array, b: Array) -> Float[Array, "*B"]:
    """Peak signal-to-noise ratio in dB of images [*B, H, W, 3] in 0..255.

    Capped at 100 dB, which identical images get.
    """
    difference = jnp.asarray(a, jnp.float32) - jnp.asarray(b, jnp.float32)
    mse = jnp.mean(jnp.square(difference / 255.0), axis=(-3, -2, -1))
    return -10.0 * jnp.log10(jnp.maximum(mse, 1e-10))


def ssim(a: Array, b: Array) -> Float[Array, "*B"]:
    """Structural similarity of images [*B, H, W, 3] in 0..255, H and W at least 11.

    Wang et al. 2004: Gaussian window of 11 pixels, sigma 1.5, K1 = 0.01, K2 = 0.03, averaged over
    the pixels where the window fits and over channels.
    """
    window = jnp.exp(-0.5 * jnp.square(jnp.arange(-5.0, 6.0) / 1.5))
    window = window / window.sum()

    def blur(x):
        for axis in (-3, -2):
            size = x.shape[axis] - 10
            shifted = (jax.lax.slice_in_dim(x, i, i + size, axis=axis % x.ndim) for i in range(11))
            x = sum(w * s for w, s in zip(window, shifted))
        return x

    a, b = (jnp.asarray(x, jnp.float32) / 255.0 for x in (a, b))
    mean_a, mean_b = blur(a), blur(b)
    variance_a = blur(a * a) - mean_a**2
    variance_b = blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return jnp.mean(luminance * structure, axis=(-3, -2, -1))


def classification(probability: np.ndarray, label: np.ndarray) -> dict[str, float]:
    """Accuracy, precision, recall and F1 of "Yes" at probability > 0.5 (0 where undefined), the
    number of "frames" and of "yes_frames" among them."""
    yes, truth = np.asarray(probability) > 0.5, np.asarray(label) > 0.5
    hits = float(np.sum(yes & truth))
    claimed, actual = float(np.sum(yes)), float(np.sum(truth))
    return {
        "accuracy": float(np.mean(yes == truth)),
        "precision": hits / claimed if claimed else 0.0,
        "recall": hits / actual if actual else 0.0,
        "f1": 2 * hits / (claimed + actual) if claimed + actual else 0.0,
        "frames": len(truth),
        "yes_frames": int(actual),
    }


def f1_interval(
    probability: np.ndarray, label: np.ndarray, episode: np.ndarray, resamples: int = 2000
) -> tuple[float, float]:
    """95 % bootstrap interval of `classification`'s F1 over episodes: frames of one episode
    resemble each other, so whole episodes are drawn (with replacement, always the same draws).

    Args:
        episode: int, the number of each frame's episode.
    """
    yes, truth = np.asarray(probability) > 0.5, np.asarray(label) > 0.5
    hits = np.bincount(episode, yes & truth)
    total = np.bincount(episode, 1.0 * yes + truth)
    known = np.unique(episode)
    drawn = np.random.default_rng(0).choice(known, (resamples, len(known)))
    total = total[drawn].sum(1)
    scores = 2 * hits[drawn].sum(1) / np.maximum(total, 1)
    low, high = np.quantile(scores, [0.025, 0.975])
    return float(low), float(high)


def calibration(
    probability: np.ndarray, label: np.ndarray, bins: int = 10
) -> dict[str, float | list[float]]:
    """Expected calibration error (Guo et al., arXiv 1706.04599) with `bins` equal bins, and per bin
    the mean probability, the share of "Yes" labels and the count."""
    probability, truth = np.asarray(probability), np.asarray(label) > 0.5
    place = np.minimum((probability * bins).astype(int), bins - 1)
    count = np.bincount(place, minlength=bins)
    divisor = np.maximum(count, 1)
    claimed = np.bincount(place, probability, bins) / divisor
    actual = np.bincount(place, truth, bins) / divisor
    error = float(np.abs(claimed - actual) @ count / max(count.sum(), 1))
    return {
        "calibration_error": error,
        "bin_probability": claimed.tolist(),
        "bin_yes_share": actual.tolist(),
        "bin_count": count.tolist(),
    }


@functools.cache  # the same function for the same model, so that JAX compiles it once
def predictor(world: WorldModel) -> Callable[[Params, Observation, Array, Array], Observation]:
    """The function (params, observation [*B], actions [*B, k, A], key) -> observation k steps
    later."""

    def predict(params, observation, actions, key):
        encode_key, step_key = jax.random.split(key)
        state = world.encode(params, observation, encode_key)
        return world.step(params, state, actions, step_key).observation

    return predict


def judge(world: WorldModel) -> Callable[[Params, Observation], Array]:
    """The function (params, observation [*B]) -> probability [*B] that the task is done."""

    def probability(params, observation):
        return world.success_probability(
            params, world.encode(params, observation, jax.random.key(0))
        )

    return probability


def imagine_chunk(
    world: WorldModel, params: Params, transitions: Transition, key: Array, batch_size: int = 64
) -> Observation:
    """The observation [N] one imagined chunk after each transition's start, as NumPy arrays."""
    predict = jax.jit(predictor(world))
    count = len(transitions.actions)
    # One shape, hence one compilation: the last batch is filled up with earlier transitions.
    batch_size = min(batch_size, count)
    parts = []
    for start in range(0, count, batch_size):
        rows = np.arange(start, start + batch_size) % count
        batch = jax.tree.map(lambda x, rows=rows: x[rows], transitions)
        seen = predict(params, batch.observation, batch.actions, jax.random.fold_in(key, start))
        keep = min(batch_size, count - start)
        parts.append(jax.tree.map(lambda x, keep=keep: np.asarray(x)[:keep], seen))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def fidelity(
    transitions: Transition, imagined: Mapping[str, np.ndarray], batch_size: int = 64
) -> dict[str, dict[str, float]]:
    """Mean PSNR and SSIM of one imagined chunk per view, and of copying the current frame.

    Args:
        transitions: with one leading axis [N].
        imagined: the images that `imagine_chunk` gave for them.

    Returns:
        camera -> {"psnr", "ssim", "copy_psnr", "copy_ssim"}.
    """
    compare, scores = jax.jit(_compare), {}
    for camera, frames in imagined.items():
        now, truth = transitions.observation.images[camera], transitions.next_images[camera]
        parts = [
            compare(*(x[i : i + batch_size] for x in (frames, now, truth)))
            for i in range(0, len(frames), batch_size)
        ]
        scores[camera] = {
            name: float(np.concatenate([part[name] for part in parts]).mean()) for name in parts[0]
        }
    return scores


def _compare(imagined, current, truth):
    return {
        "psnr": psnr(imagined, truth),
        "ssim": ssim(imagined, truth),
        "copy_psnr": psnr(current, truth),
        "copy_ssim": ssim(current, truth),
    }


def proprio_error(transitions: Transition, imagined: Array) -> dict[str, list[float]]:
    """Mean absolute error per value of proprioception imagined [N, P], and of holding it fixed:
    {"error": [P], "copy_error": [P]}."""
    now, later = transitions.observation.proprio, transitions.next_proprio
    return {
        "error": np.abs(imagined - later).mean(0).tolist(),
        "copy_error": np.abs(now - later).mean(0).tolist(),
    }


def motion_by_decile(
    current: np.ndarray, imagined: np.ndarray, truth: np.ndarray
) -> dict[str, list[float]]:
    """Mean absolute change of pixels (grey levels) by decile of the real change, smallest first.

    Args:
        current, imagined, truth: uint8 [N, H, W, 3].

    Returns:
        {"real": [10], "imagined": [10]}; a model that predicts "nothing moved" has small numbers in
        the second list (the motion underestimation of arXiv 2603.20607, appendix E.2).
    """

    def change(frames):
        return np.abs(frames.astype(np.int16) - current).mean(axis=(1, 2, 3))

    real, predicted = change(truth), change(imagined)
    groups = np.array_split(np.argsort(real, kind="stable"), 10)
    return {
        "real": [float(real[g].mean()) for g in groups if len(g)],
        "imagined": [float(predicted[g].mean()) for g in groups if len(g)],
    }


def out_of_view(
    current: np.ndarray,
    imagined: np.ndarray,
    truth: np.ndarray,
    patch: int = 8,
    threshold: float = 12.0,
) -> dict[str, float | None]:
    """Errors where the next frame shows what the current frame did not: content that came into
    view, which a model has to invent (the out-of-view failures of arXiv 2603.20607, appendix E.2).

    A patch of the real next frame is "seen" if some window of the current frame, at any place, is
    within `threshold` grey levels (root mean square) of it.

    Args:
        current, imagined, truth: uint8 [N, H, W, 3]; averaged down to about 64 pixels first.

    Returns:
        "unseen_share" of the patches, and "seen_rms", "unseen_rms": the root mean square errors
        (grey levels) of the imagined patches of each kind, None where there are none.
    """
    factor = max(1, current.shape[1] // 64)

    def windows(frame, stride):
        side = frame.shape[0] // factor
        frame = frame[: side * factor, : side * factor].astype(np.float32)
        frame = frame.reshape(side, factor, side, factor, 3).mean((1, 3))
        every = np.lib.stride_tricks.sliding_window_view(frame, (patch, patch), axis=(0, 1))
        return every[::stride, ::stride].reshape(-1, 3 * patch * patch)

    seen, errors = [], []
    for now, model, real in zip(current, imagined, truth):
        candidates, wanted = windows(now, 1), windows(real, patch)
        # |a - b|² = |a|² - 2 a·b + |b|²
        squares = np.square(candidates).sum(1) - 2 * wanted @ candidates.T
        nearest = squares.min(1) + np.square(wanted).sum(1)
        seen.append(nearest <= threshold**2 * wanted.shape[1])
        errors.append(np.square(windows(model, patch) - wanted).mean(1))
    seen, errors = np.concatenate(seen), np.concatenate(errors)

    def rms(chosen):
        return float(np.sqrt(errors[chosen].mean())) if chosen.any() else None

    return {
        "unseen_share": float(1 - seen.mean()),
        "seen_rms": rms(seen),
        "unseen_rms": rms(~seen),
    }


def unexplained(current: np.ndarray, imagined: np.ndarray, truth: np.ndarray) -> float:
    """Squared pixel error of imagined frames as a share of the real squared change: 0 is perfect, 1
    as bad as copying the current frame. uint8 [N, H, W, 3] each."""
    now, guess, real = (np.asarray(x, np.float32) for x in (current, imagined, truth))
    return float(np.square(guess - real).mean() / max(np.square(real - now).mean(), 1e-9))


def response(
    current: np.ndarray, imagined: np.ndarray, others: np.ndarray, truth: np.ndarray
) -> float:
    """How much a prediction changes when the actions are another transition's (`others`), in the
    same unit as `unexplained`: squared change as a share of the real one."""
    now, guess, other, real = (
        np.asarray(x, np.float32) for x in (current, imagined, others, truth)
    )
    return float(np.square(guess - other).mean() / max(np.square(real - now).mean(), 1e-9))


def rank_of_truth(errors: np.ndarray) -> float:
    """Share of rows of errors [N, C] in which the first column, the true chunk's, is the lowest."""
    return float((errors.argmin(axis=1) == 0).mean())


def fit_probe(
    images: np.ndarray, targets: np.ndarray, ridge: float = 1e-2
) -> Callable[[np.ndarray], np.ndarray]:
    """A function that reads targets [N, T] from frames uint8 [N, H, W, 3]: ridge regression with a
    Gaussian kernel, whose width is the median distance of the given frames. It sees pixels averaged
    down to about 16 per side.

    Args:
        ridge: penalty on the kernel's weights.
    """

    def pixels(images):
        factor = max(1, images.shape[1] // 16)
        side = images.shape[1] // factor
        x = images[:, : side * factor, : side * factor].astype(np.float32) / 127.5 - 1.0
        return x.reshape(len(x), side, factor, side, factor, 3).mean((2, 4)).reshape(len(x), -1)

    known, centre = pixels(images), targets.mean(0)

    def squared_distances(x):
        products = x @ known.T
        return np.square(x).sum(1)[:, None] + np.square(known).sum(1) - 2.0 * products

    distances = squared_distances(known)
    width = max(float(np.median(distances)), 1e-6)
    system = np.exp(-distances / width, dtype=np.float64) + ridge * np.eye(len(known))
    weights = np.linalg.solve(system, targets - centre)
    return lambda x: np.exp(-squared_distances(pixels(x)) / width) @ weights + centre


def imagine_open_loop(
    world: WorldModel,
    params: Params,
    observation: Observation,
    actions: Float[Array, "n B k A"],
    key: Array,
) -> dict[str, np.ndarray]:
    """The views after each of n recorded chunks imagined one after the other from `observation`
    [B]: camera -> uint8 [n, B, H, W, 3]."""
    encode_key, *keys = jax.random.split(key, 1 + len(actions))
    state, step = jax.jit(world.encode)(params, observation, encode_key), jax.jit(world.step)
    frames = []
    for chunk, step_key in zip(actions, keys):
        state = step(params, state, chunk, step_key)
        frames.append(jax.device_get(state.observation.images))
    return {camera: np.stack([f[camera] for f in frames]) for camera in frames[0]}


def horizon_curve(
    start: Mapping[str, Array], imagined: Mapping[str, Array], images: Mapping[str, Array]
) -> dict[str, dict[str, np.ndarray]]:
    """Errors after 1..n chunks.

    Args:
        start: camera -> uint8 [B, H, W, 3], what the imagination started from.
        imagined, images: camera -> uint8 [n, B, H, W, 3], imagined and seen after each chunk.

    Returns:
        camera -> {"psnr": [n], "copy_psnr": [n], "unexplained": [n]}, means; copies are of the
        starting frame.
    """
    return {
        camera: {
            "psnr": np.asarray(psnr(imagined[camera], truth)).mean(1),
            "copy_psnr": np.asarray(psnr(start[camera], truth)).mean(1),
            "unexplained": np.array(
                [unexplained(start[camera], a, b) for a, b in zip(imagined[camera], truth)]
            ),
        }
        for camera, truth in images.items()
    }
