"""What the folder `meta/` of a LeRobot dataset says of its episodes."""

import dataclasses
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow.parquet as pq

from mbpo_jax.data.formats.recording import reading

VERSIONS = ("v2.0", "v2.1", "v3.0")
_STRETCH_TOLERANCE = 0.5  # frames
_LARGEST = 2**53  # of the numbers in meta/
_KINDS = {str: "a text", int: "a whole number", float: "a number", dict: "an object"}


@dataclasses.dataclass(frozen=True)
class EpisodeMeta:
    """What `meta/` says of an episode."""

    where: str
    number: int
    length: int
    tasks: object  # as they are there
    table: Path
    videos: Mapping[str, tuple[Path, float]]  # key -> file, and the second where it begins there
    rows: tuple[int, int] | None  # of the whole dataset, from and up to


def read_info(path: Path) -> dict:
    """What `meta/info.json` says of all episodes. Raises ValueError where it is damaged."""
    info = _object(json.loads(path.read_bytes()))
    version = info.get("codebase_version")
    if version not in VERSIONS:
        raise ValueError(f"codebase_version is {version}, supported are {', '.join(VERSIONS)}")
    if not _value(info, "fps", float) > 0:
        raise ValueError(f"fps is {info['fps']}, expected a number above 0")
    if version != "v3.0" and _value(info, "chunks_size", int) < 1:
        raise ValueError(f"chunks_size is {info['chunks_size']}, expected 1 or more")
    _value(info, "data_path", str)
    _value(info, "features", dict)
    return info


def video_keys(info: dict, cameras: Mapping[str, str]) -> list[str]:
    """The keys of those cameras (camera -> key) that are videos; the others are images."""
    videos = []
    for camera, key in cameras.items():
        feature = info["features"][key]
        kind = feature.get("dtype") if isinstance(feature, dict) else feature
        if kind not in ("image", "video"):
            raise ValueError(
                f"camera {camera}: {key} has dtype {kind!r:.60} in meta/info.json; only 'image' "
                "and 'video' are read"
            )
        if kind == "video":
            with reading("meta/info.json"):
                _value(info, "video_path", str)
            videos.append(key)
    return videos


def episode_rows(source: Path, version: str) -> Iterator[tuple[str, dict | Exception]]:
    """Where `meta/` tells of each episode, and what; an error for what cannot be read there."""
    if version == "v3.0":
        tables = sorted((source / "meta/episodes").glob("*/*.parquet"))
        if not tables:
            raise ValueError("meta/episodes has no tables: is this version 2.1?")
        for path in tables:
            where = path.relative_to(source).as_posix()
            try:
                with reading("missing, truncated or corrupt"):
                    schema = pq.read_schema(path)
                    columns = [name for name in schema.names if not name.startswith("stats/")]
                    found = pq.read_table(path, columns=columns).to_pylist()
            except ValueError as error:
                yield where, error
                continue
            yield from ((f"{where} row {i}", row) for i, row in enumerate(found))
        return
    path = source / "meta/episodes.jsonl"
    if not path.is_file():
        raise ValueError("meta/episodes.jsonl is missing: is this version 3.0?")
    for i, line in enumerate(path.read_bytes().splitlines()):
        if line.strip():
            where = f"meta/episodes.jsonl line {i + 1}"
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield where, ValueError(f"it is no JSON: {error}")


def entry_name(where: str, row: object) -> str:
    """What an episode is called: by its number where it has one."""
    number = row.get("episode_index") if isinstance(row, dict) else None
    return f"episode_{number:06d}" if type(number) is int else where


def _object(value: object) -> dict:
    if not isinstance(value, dict):
        raise ValueError(f"it is {json.dumps(value):.60}, expected an object")
    return value


def _value(entries: Mapping, name: str, kind: type):
    """An entry of `meta/` that must be of this kind, and a number finite."""
    value = entries.get(name)
    if value is None:
        raise ValueError(f"{name} is missing or null")
    allowed = (int, float) if kind is float else kind
    if isinstance(value, bool) or not isinstance(value, allowed):
        raise ValueError(f"{name} is {value!r:.60}, expected {_KINDS[kind]}")
    if isinstance(value, int | float) and not -_LARGEST < value < _LARGEST:
        raise ValueError(f"{name} is {value!r:.60}, expected {_KINDS[kind]} within reason")
    return value


def read_episode(
    source: Path, info: dict, videos: Iterable[str], where: str, row: object
) -> EpisodeMeta:
    """What a row of `episode_rows` says. Raises ValueError for what cannot be so."""
    if isinstance(row, Exception):
        raise row
    row = _object(row)
    number, length = _value(row, "episode_index", int), _value(row, "length", int)
    if number < 0 or length < 0:
        raise ValueError(f"episode_index is {number} and length {length}, expected 0 or more")
    three = info["codebase_version"] == "v3.0"

    def path(template, prefix, **fields):
        """By the names that either version's templates use."""
        fields["episode_index"] = number
        if three:
            fields["chunk_index"] = _value(row, f"{prefix}/chunk_index", int)
            fields["file_index"] = _value(row, f"{prefix}/file_index", int)
        else:
            fields["episode_chunk"] = fields["chunk_index"] = number // info["chunks_size"]
        try:
            return source / info[template].format(**fields)
        except (KeyError, IndexError, AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{template} {info[template]!r} of meta/info.json has a field that cannot be "
                f"filled ({error}); there are {', '.join(fields)}"
            ) from error

    files = {}
    for key in videos:
        start = _value(row, f"videos/{key}/from_timestamp", float) if three else 0.0
        end = row.get(f"videos/{key}/to_timestamp") if three else None
        if end is not None:
            end = _value(row, f"videos/{key}/to_timestamp", float)
            if abs((end - start) * info["fps"] - length) > _STRETCH_TOLERANCE:
                raise ValueError(
                    f"videos/{key} goes from {start:.3f} to {end:.3f} s, which at {info['fps']} Hz "
                    f"are {(end - start) * info['fps']:.1f} frames for {length} rows"
                )
        files[key] = (path("video_path", f"videos/{key}", video_key=key), float(start))
    first, last = (row.get(f"dataset_{name}_index") if three else None for name in ("from", "to"))
    rows = None
    if type(first) is type(last) is int:
        rows = (first, last)
        if last - first != length:
            raise ValueError(f"rows {first} to {last} are {last - first}, its length is {length}")
    table = path("data_path", "data")
    return EpisodeMeta(where, number, length, row.get("tasks"), table, files, rows)


def find_shared(episodes: Sequence[EpisodeMeta], fps: float) -> dict[int, str]:
    """By their position, the episodes that share a part of a video or of the rows, or their number,
    with another, and what they share."""
    stretches, shared = [], {}
    for i, episode in enumerate(episodes):
        for path, start in episode.videos.values():
            stretches.append((str(path), start * fps, start * fps + episode.length, i))
        if episode.rows:
            stretches.append(("the dataset's rows", *episode.rows, i))
        stretches.append(("the episodes' numbers", episode.number, episode.number + 1, i))
    for what, group in itertools.groupby(sorted(stretches), key=lambda stretch: stretch[0]):
        longest = None  # of those before, the one that ends last
        for stretch in group:
            _, begin, end, i = stretch
            if longest and begin < longest[2] - _STRETCH_TOLERANCE:
                for one, other in ((i, longest[3]), (longest[3], i)):
                    shared[one] = (
                        f"by meta/ it shares a part of {what}, from {begin:g} on, with episode "
                        f"{episodes[other].number}"
                    )
            if longest is None or end > longest[2]:
                longest = stretch
    return shared
