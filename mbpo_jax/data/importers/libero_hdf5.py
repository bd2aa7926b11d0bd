"""The HDF5 files of LIBERO's original demonstrations, one per task.

A file holds `data/demo_N/` with `actions` [T, 7], `obs/ee_states` [T, 6], `obs/gripper_states`
[T, 2], `rewards` and `dones` [T], and frames `obs/agentview_rgb` and `obs/eye_in_hand_rgb` as the
simulator drew them, upside down: they are turned by 180 degrees here, as openpi and OpenVLA do.
The instruction and the control rate are JSON attributes of `data`.

Needs h5py (extra `import`).
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from mbpo_jax.data.importers.recording import Entry, Names, Recording, join

_REQUIRED = {
    "actions": (("actions",),),
    "proprio": (
        ("obs/ee_states", "obs/gripper_states"),
        ("obs/ee_pos", "obs/ee_ori", "obs/gripper_states"),
    ),
}
_OPTIONAL = {"reward": (("rewards",), ("dones",))}
_CAMERAS = {
    "agentview": (("obs/agentview_rgb",),),
    "robot0_eye_in_hand": (("obs/eye_in_hand_rgb",),),
}


def entries(source: Path, names: Names) -> list[Entry]:
    """The recordings of a file or of all `.hdf5` files below a folder.

    Raises:
        ValueError: there is no such file.
    """
    files = sorted(source.rglob("*.hdf5")) if source.is_dir() else [source]
    files = [path for path in files if path.is_file()]
    if not files:
        raise ValueError(f"{source} is not a LIBERO dataset: it has no .hdf5 files")
    root = source if source.is_dir() else source.parent
    return [
        Entry(name, lambda path=path, demo=demo: _read(path, demo, names))
        for path in files
        for name, demo in _demos(path, path.relative_to(root).as_posix())
    ]


def _demos(path: Path, file_name: str) -> list[tuple[str, str]]:
    """(entry's name, demo) of a file; a single entry without a demo where it cannot be listed, so
    that reading it tells why."""
    try:
        with h5py.File(path) as file:
            demos = sorted(file["data"], key=lambda demo: (len(demo), demo))
    except (OSError, KeyError):
        return [(file_name, "")]
    return [(f"{file_name}:{demo}", demo) for demo in demos]


def _read(path: Path, demo: str, names: Names) -> Recording:
    try:
        with h5py.File(path) as file:
            return _recording(path, file["data"], demo, names)
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is truncated, or not a LIBERO file: {error}") from error


def _recording(path: Path, data: h5py.Group, demo: str, names: Names) -> Recording:
    if not demo:
        raise KeyError("it has no data/demo_N")
    group = data[demo]
    available: list[str] = []
    group.visititems(
        lambda key, item: available.append(key) if isinstance(item, h5py.Dataset) else None
    )
    keys = names.find(available, _REQUIRED, _OPTIONAL, _CAMERAS, "obs/")

    def column(field):
        return join({key: group[key][()] for key in keys[field]})

    actions = column("actions")

    def frames(key, steps):
        with _open_frames(path, f"data/{demo}/{key}", len(actions)) as images:
            return np.stack([images[step] for step in steps])[:, ::-1, ::-1]

    return Recording(
        instruction=_instruction(data),
        actions=actions,
        proprio=column("proprio"),
        images={c: lambda steps, key=keys[c][0]: frames(key, steps) for c in names.cameras},
        success=bool(column("reward")[-1] > 0) if "reward" in keys and len(actions) else None,
        control_rate=_control_rate(data),
    )


@contextlib.contextmanager
def _open_frames(path: Path, key: str, count: int) -> Iterator[h5py.Dataset]:
    try:
        with h5py.File(path) as file:
            if len(file[key]) != count:
                raise ValueError(f"{key} has {len(file[key])} frames for {count} actions")
            yield file[key]
    except OSError as error:
        raise ValueError(f"{path} is truncated or corrupt: {error}") from error


def _instruction(data: h5py.Group) -> str:
    # A list of characters or words in some of the files.
    return "".join(json.loads(data.attrs["problem_info"])["language_instruction"]).strip(' "')


def _control_rate(data: h5py.Group) -> float | None:
    arguments = json.loads(data.attrs.get("env_args", "{}")).get("env_kwargs", {})
    return float(arguments["control_freq"]) if "control_freq" in arguments else None
