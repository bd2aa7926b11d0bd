"""The HDF5 files of LIBERO's original demonstrations, one per task, and those of robomimic.

A file holds `data/demo_N/` with `actions` [T, 7], `obs/ee_states` [T, 6], `obs/gripper_states`
[T, 2], `rewards` and `dones` [T], and frames `obs/agentview_rgb` and `obs/eye_in_hand_rgb` as the
simulator drew them, upside down: they are turned by 180 degrees here unless another orientation is
asked for, as openpi and OpenVLA do. The instruction and the control rate are JSON attributes of
`data`. Members of `data` that are no groups are passed over.

Needs h5py (extra `import`).
"""

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

import h5py

from mbpo_jax.data.formats.recording import (
    HOW_TO_INSTRUCT,
    Entry,
    Names,
    Recording,
    assemble,
    reading,
    stack,
)

_KEYS = {
    "actions": (("actions",),),
    "proprio": (
        ("obs/ee_states", "obs/gripper_states"),
        ("obs/ee_pos", "obs/ee_ori", "obs/gripper_states"),
    ),
    "reward": (("rewards",), ("dones",)),
}
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
    files = [path for path in files if not path.is_dir()]
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
        with _opened(path) as file:
            data = _group(file, "data")
            demos = [name for name in data if _may_be_demo(data, name)]
    except ValueError:
        return [(file_name, "")]
    demos.sort(key=lambda demo: (len(demo), demo))
    return [(f"{file_name}:{demo}", demo) for demo in demos] or [(file_name, "")]


def _may_be_demo(data: h5py.Group, name: str) -> bool:
    try:
        with reading(name):
            return not isinstance(data.get(name), h5py.Dataset | h5py.Datatype)
    except ValueError:  # reading the demo tells why
        return True


def _read(path: Path, demo: str, names: Names) -> Recording:
    with _opened(path) as file:
        data = _group(file, "data")
        if not demo:
            raise ValueError("data has no demo_N")
        return _recording(path, data, demo, names)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[h5py.File]:
    """An HDF5 file; whatever goes wrong with it is a ValueError."""
    with reading(str(path)):
        try:
            file = h5py.File(path)
        except OSError as error:
            raise ValueError(f"missing, truncated, or no HDF5 file: {error}") from error
        with file:
            yield file


def _group(parent: h5py.Group, name: str) -> h5py.Group:
    if not isinstance(group := parent.get(name), h5py.Group):
        kind = "missing" if group is None else f"a {type(group).__name__.lower()}"
        raise ValueError(f"{name} is {kind}, expected a group")
    return group


def _recording(path: Path, data: h5py.Group, demo: str, names: Names) -> Recording:
    group = _group(data, demo)
    available: list[str] = []
    group.visititems(
        lambda key, item: available.append(key) if isinstance(item, h5py.Dataset) else None
    )
    keys = names.find(available, _KEYS, _CAMERAS, "obs/")

    def frames(key, steps):
        with _opened(path) as file, reading(f"data/{demo}/{key}"):
            images = file[f"data/{demo}/{key}"]
            if images.ndim != 4 or images.dtype.kind not in "biuf":
                raise ValueError(
                    f"it has shape {images.shape} and type {images.dtype}, expected (steps, "
                    "height, width, 3) and uint8: encoded images are not read"
                )
            if len(images) != count:
                raise ValueError(f"it has {len(images)} frames for {count} actions")
            return stack([images[step] for step in steps], steps)

    with reading(f"data/{demo}"):
        recording = assemble(
            names,
            keys,
            lambda key: group[key][()],
            lambda: _instruction(data),
            images={c: lambda steps, key=keys[c][0]: frames(key, steps) for c in names.cameras},
            control_rate=_control_rate(data),
            orientation="rotated",
        )
    count = len(recording.actions)
    return recording


def _instruction(data: h5py.Group) -> str:
    if "problem_info" not in data.attrs:
        raise ValueError(f"no instruction: data has no attribute problem_info; {HOW_TO_INSTRUCT}")
    text = _attribute(data, "problem_info").get("language_instruction")
    # A list of characters or words in some of the files.
    if isinstance(text, list) and all(isinstance(part, str) for part in text):
        text = ("" if all(len(part) == 1 for part in text) else " ").join(text)
    if not isinstance(text, str):
        raise ValueError(
            f"no instruction: language_instruction in data's attribute problem_info is {text!r:.60}"
            f", expected a text; {HOW_TO_INSTRUCT}"
        )
    return text.strip(' "')


def _control_rate(data: h5py.Group) -> float | None:
    if "env_args" not in data.attrs:
        return None
    arguments = _attribute(data, "env_args").get("env_kwargs", {})
    with reading("data's attribute env_args"):
        if not isinstance(arguments, dict):
            raise ValueError(f"env_kwargs is {arguments!r:.60}, expected a JSON object")
        if "control_freq" not in arguments:
            return None
        rate = arguments["control_freq"]
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 < rate < math.inf:
            raise ValueError(f"control_freq is {rate!r:.60}, expected a number above 0")
        return float(rate)


def _attribute(data: h5py.Group, name: str) -> dict:
    """An attribute that holds a JSON object."""
    with reading(f"data's attribute {name}"):
        value = data.attrs[name]
        if not isinstance(value, str | bytes):
            raise ValueError(f"it is of type {type(value).__name__}, expected a text of JSON")
        try:
            found = json.loads(value)
        except ValueError as error:
            raise ValueError(f"it is no JSON: {error}") from error
        if not isinstance(found, dict):
            raise ValueError(f"it is {json.dumps(found):.60}, expected a JSON object")
        return found
