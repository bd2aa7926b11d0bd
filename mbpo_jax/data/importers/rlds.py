"""RLDS datasets in TFRecord files, as openpi and OpenVLA use them for LIBERO, without TensorFlow.

A record is a `tf.train.Example` of one episode whose features `steps/...` hold all its steps one
after the other: `steps/action` [T * A], `steps/observation/state` [T * P], encoded images
`steps/observation/image` and `steps/observation/wrist_image`, `steps/language_instruction`. Field
names here leave `steps/` out. Frames of LIBERO are upright in these datasets.

A TFRecord file repeats (length u64, masked CRC-32C of the length, bytes, masked CRC-32C of the
bytes), little-endian, as TensorFlow's `record_writer.h` says. Needs google-crc32c (extra `import`).
"""

import struct
from pathlib import Path

import google_crc32c
import numpy as np
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from mbpo_jax.data.importers.recording import Entry, Names, Recording, decode_image, join

_REQUIRED = {
    "actions": (("action",),),
    "proprio": (("observation/state",), ("observation/proprio",)),
    "instruction": (("language_instruction",), ("observation/natural_language_instruction",)),
}
_OPTIONAL = {"reward": (("reward",),)}
_CAMERAS = {
    "agentview": (("observation/image",),),
    "robot0_eye_in_hand": (("observation/wrist_image",),),
}
_STEPS = "steps/"
_LENGTH = struct.Struct("<QI")
_CRC = struct.Struct("<I")


def entries(source: Path, names: Names) -> list[Entry]:
    """The recordings of one TFRecord file or of all below a folder.

    Raises:
        ValueError: there is no such file.
    """
    files = sorted(p for p in source.rglob("*") if ".tfrecord" in p.name) if source.is_dir() else []
    files = [path for path in files or [source] if path.is_file()]
    if not files:
        raise ValueError(f"{source} is not an RLDS dataset: it has no files named *.tfrecord*")
    root = source if source.is_dir() else source.parent
    return [
        Entry(
            f"{path.relative_to(root).as_posix()}:{i}",
            lambda path=path, offset=offset: _recording(_read_record(path, offset), names),
        )
        for path in files
        for i, offset in enumerate(_offsets(path))
    ]


def _offsets(path: Path) -> list[int]:
    """Where the records begin. One after a damaged length is not found; reading the damaged one
    tells so, since its checksum is wrong, and an empty file counts as a damaged record."""
    size, offsets = path.stat().st_size, [0]
    with path.open("rb") as file:
        while True:
            file.seek(offsets[-1])
            head = file.read(_LENGTH.size)
            if len(head) < _LENGTH.size or not _matches(head[:8], head[8:]):
                return offsets
            end = offsets[-1] + _LENGTH.size + _LENGTH.unpack(head)[0] + _CRC.size
            if end >= size:
                return offsets
            offsets.append(end)


def _read_record(path: Path, offset: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        head = file.read(_LENGTH.size)
        if len(head) < _LENGTH.size:
            raise ValueError(f"{path} is truncated at byte {offset}")
        if not _matches(head[:8], head[8:]):
            raise ValueError(
                f"{path} is corrupt at byte {offset}: a checksum is wrong, and whatever follows in "
                "this file cannot be read"
            )
        length = _LENGTH.unpack(head)[0]
        data, crc = file.read(length), file.read(_CRC.size)
    if len(data) < length or len(crc) < _CRC.size:
        raise ValueError(f"{path} is truncated in the record at byte {offset}")
    if not _matches(data, crc):
        raise ValueError(f"{path} is corrupt in the record at byte {offset}: wrong checksum")
    return data


def _matches(data: bytes, stored: bytes) -> bool:
    crc = google_crc32c.value(data)
    masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
    return masked == _CRC.unpack(stored)[0]


def _recording(record: bytes, names: Names) -> Recording:
    try:
        features = tf_example_pb2.Example.FromString(record).features.feature
    except DecodeError as error:
        raise ValueError(f"a record is no tf.train.Example: {error}") from error
    available = [key.removeprefix(_STEPS) for key in features if key.startswith(_STEPS)]
    keys = names.find(available, _REQUIRED, _OPTIONAL, _CAMERAS, "observation/")
    instructions = list(features[_STEPS + keys["instruction"][0]].bytes_list.value)
    count = len(instructions)

    def column(field):
        return join({key: _numbers(features[_STEPS + key], key, count) for key in keys[field]})

    def frames(key, steps):
        images = features[_STEPS + key].bytes_list.value
        if len(images) != count:
            raise ValueError(f"{key} has {len(images)} encoded images for {count} steps")
        return np.stack([decode_image(images[step]) for step in steps])

    if len(set(instructions)) > 1:
        raise ValueError(f"the instruction changes within the episode: {sorted(set(instructions))}")
    return Recording(
        instruction=instructions[0].decode().strip() if instructions else "",
        actions=column("actions"),
        proprio=column("proprio"),
        images={c: lambda steps, key=keys[c][0]: frames(key, steps) for c in names.cameras},
        success=bool(column("reward")[-1] > 0) if "reward" in keys and count else None,
        control_rate=None,
    )


def _numbers(feature, key: str, count: int) -> np.ndarray:
    """[count, D] of a feature's numbers, float32 or int64 as they are stored."""
    kind = feature.WhichOneof("kind")
    if kind not in ("float_list", "int64_list"):
        raise ValueError(f"{key} holds {kind or 'nothing'}, expected numbers")
    dtype = np.float32 if kind == "float_list" else np.int64
    values = np.asarray(getattr(feature, kind).value, dtype)
    if not count or len(values) % count:
        raise ValueError(f"{key} has {len(values)} numbers for {count} steps")
    return values.reshape(count, -1)
