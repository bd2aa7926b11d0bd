"""RLDS datasets in TFRecord files, as openpi and OpenVLA use them for LIBERO, without TensorFlow.

A record is a `tf.train.Example` of one episode whose features `steps/...` hold all its steps one
after the other: `steps/action` [T * A], `steps/observation/state` [T * P], encoded images
`steps/observation/image` and `steps/observation/wrist_image`, `steps/language_instruction`. Field
names here leave `steps/` out. Frames of LIBERO are upright in these datasets.

A TFRecord file repeats (length u64, masked CRC-32C of the length, bytes, masked CRC-32C of the
bytes), little-endian, as TensorFlow's `record_writer.h` says. Needs google-crc32c (extra `import`).
"""

import contextlib
import struct
from pathlib import Path

import google_crc32c
import numpy as np
from google.protobuf.message import DecodeError
from tensorflow_datasets.proto import tf_example_pb2

from mbpo_jax.data.formats.recording import (
    HOW_TO_INSTRUCT,
    Entry,
    Names,
    Recording,
    assemble,
    decode_image,
    reading,
    stack,
)

_KEYS = {
    "actions": (("action",),),
    "proprio": (("observation/state",), ("observation/proprio",)),
    "instruction": (("language_instruction",), ("observation/natural_language_instruction",)),
    "reward": (("reward",),),
}
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
    files = [path for path in files or [source] if not path.is_dir()]
    if not files:
        raise ValueError(f"{source} is not an RLDS dataset: it has no files named *.tfrecord*")
    root = source if source.is_dir() else source.parent
    return [
        Entry(
            f"{path.relative_to(root).as_posix()}:{i}",
            lambda path=path, offset=offset: _read(path, offset, names),
        )
        for path in files
        for i, offset in enumerate(_offsets(path))
    ]


def _offsets(path: Path) -> list[int]:
    """Where the records begin. One after a damaged length is not found; reading the damaged one
    tells so, since its checksum is wrong, and a file that is empty or cannot be opened counts as a
    damaged record."""
    offsets = [0]
    with contextlib.suppress(OSError), path.open("rb") as file:
        size = path.stat().st_size
        while True:
            file.seek(offsets[-1])
            head = file.read(_LENGTH.size)
            if len(head) < _LENGTH.size or not _matches(head[:8], head[8:]):
                return offsets
            end = offsets[-1] + _LENGTH.size + _LENGTH.unpack(head)[0] + _CRC.size
            if end >= size:
                return offsets
            offsets.append(end)
    return offsets


def _read(path: Path, offset: int, names: Names) -> Recording:
    with reading(str(path)):
        return _recording(_read_record(path, offset), names)


def _read_record(path: Path, offset: int) -> bytes:
    with path.open("rb") as file:
        left = path.stat().st_size - offset - _LENGTH.size - _CRC.size
        file.seek(offset)
        head = file.read(_LENGTH.size)
        if len(head) < _LENGTH.size:
            raise ValueError(f"truncated at byte {offset}")
        if not _matches(head[:8], head[8:]):
            raise ValueError(
                f"corrupt at byte {offset}: a checksum is wrong, and whatever follows in this file "
                "cannot be read"
            )
        length = _LENGTH.unpack(head)[0]
        if length > left:
            raise ValueError(f"truncated in the record at byte {offset}")
        data, crc = file.read(length), file.read(_CRC.size)
    if not _matches(data, crc):
        raise ValueError(f"corrupt in the record at byte {offset}: wrong checksum")
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
    keys = names.find(available, _KEYS, _CAMERAS, "observation/")
    # Numbers are stored one after the other; a step has one text and one image of each camera.
    counted = keys.get("instruction", keys[names.cameras[0]])[0]
    kind = features[_STEPS + counted].WhichOneof("kind")
    if kind in ("float_list", "int64_list"):
        raise ValueError(f"{counted} holds {kind}, expected a text or an encoded image a step")
    count = len(features[_STEPS + counted].bytes_list.value)
    if not count:
        raise ValueError(f"it has no rows: {counted} is empty")

    def frames(key, steps):
        with reading(key):
            images = _values(features[_STEPS + key], count)
            frames = []
            for step in steps:
                with reading(f"row {step}"):
                    frames.append(decode_image(images[step]))
            return stack(frames, steps)

    return assemble(
        names,
        keys,
        lambda key: _values(features[_STEPS + key], count),
        _no_instruction,
        images={c: lambda steps, key=keys[c][0]: frames(key, steps) for c in names.cameras},
        control_rate=None,
    )


def _no_instruction() -> str:
    looked = " or ".join(key for (key,) in _KEYS["instruction"])
    raise ValueError(f"no instruction: there is no {looked}; {HOW_TO_INSTRUCT}")


def _values(feature, count: int) -> np.ndarray:
    """[count, D] of a feature's numbers, float32 or int64 as they are stored, or [count] bytes."""
    kind = feature.WhichOneof("kind")
    if kind is None:
        raise ValueError("it holds nothing")
    values = getattr(feature, kind).value
    if kind == "bytes_list":
        if len(values) != count:
            raise ValueError(f"it has {len(values)} texts or images for {count} steps")
        return np.array(values, object)
    if not len(values) or len(values) % count:
        raise ValueError(f"it has {len(values)} numbers for {count} steps")
    return np.asarray(values, np.float32 if kind == "float_list" else np.int64).reshape(count, -1)
