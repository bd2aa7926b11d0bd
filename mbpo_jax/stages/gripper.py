"""Where the gripper is, read from views by probes: what a view shows, in centimetres."""

from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from mbpo_jax.data.pipelines import ObservationBuilder, collate_some, spread, transitions
from mbpo_jax.episode import Episode
from mbpo_jax.types import Params, Transition, WorldModel
from mbpo_jax.world_model import metrics

Images = Mapping[str, np.ndarray]  # per camera
Probe = Callable[[np.ndarray], np.ndarray]  # frames [N, H, W, 3] -> positions [N, 3], metres

PROBE_FRAMES = 2000


def gripper_errors(
    world: WorldModel,
    params: Params,
    train: list[Episode],
    builder: ObservationBuilder,
    chosen: Transition,
    imagined: Images,
) -> dict:
    """Median distance (cm) between the gripper's position and what probes read of it from the views
    a chunk later, seen and `imagined`, of the transitions `chosen`: camera -> {"real", "imagined"}.

    A probe learns from seen and imagined frames of the episodes `train` alike, since it asks where
    a view shows the gripper, and not whether the view is as sharp as a camera's.

    Args:
        chosen: held-out transitions [N].
        imagined: camera -> uint8 [N, H, W, 3], imagined from them by `metrics.imagine_chunk`.
    """
    known = collate_some(transitions(train, builder, chosen.actions.shape[1]), PROBE_FRAMES)
    frames = metrics.imagine_chunk(world, params, known, jax.random.key(0)).images
    probes = gripper_probes(train, list(imagined), (frames, known.next_proprio))
    position, errors = chosen.next_proprio[:, :3], {}
    for camera, read in probes.items():
        views = {"real": chosen.next_images[camera], "imagined": imagined[camera]}
        errors[camera] = {
            name: float(100 * np.median(np.linalg.norm(read(x) - position, axis=-1)))
            for name, x in views.items()
        }
    return errors


def gripper_probes(
    episodes: list[Episode],
    cameras: Sequence[str],
    others: tuple[Images, np.ndarray] | None = None,
) -> dict[str, Probe]:
    """Camera -> what reads the gripper's position (the first three values of proprioception) from
    its frames (`metrics.fit_probe`), fitted to those of the episodes, and to `others` with their
    proprioception [N, P]."""
    places = [(e, f) for e in episodes for f in range(len(e.timesteps))]
    chosen = [places[i] for i in spread(len(places), PROBE_FRAMES)]
    position = np.stack([e.proprio[f, :3] for e, f in chosen])
    if others:
        position = np.concatenate([position, others[1][:, :3]])
    probes = {}
    for camera in cameras:
        frames = np.stack([e.images[camera][f] for e, f in chosen])
        if others:
            frames = np.concatenate([frames, others[0][camera]])
        probes[camera] = metrics.fit_probe(frames, position)
    return probes
