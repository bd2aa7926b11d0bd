"""Tiny recordings with known values, written in the formats that are imported."""

import dataclasses
import io
import json

import numpy as np
from PIL import Image
from tensorboardX.record_writer import RecordWriter
from tensorflow_datasets.proto import tf_example_pb2

CAMERAS = ("agentview", "robot0_eye_in_hand")


@dataclasses.dataclass
class Truth:
    """Upright observations whose top left quarter is red, brighter by 10 a step, on blue (and the
    other camera's the complement); an action's first entry counts the steps in hundredths."""

    steps: int = 14

    def __post_init__(self):
        self.instruction = "pick up the book and place it in the back compartment of the caddy"
        count = np.arange(self.steps, dtype=np.float32)
        signs = np.array([1, -1, 0, 0, 0, 0, 1], np.float32)
        self.actions = count[:, None] / 100 * signs
        self.proprio = np.tile(count[:, None], (1, 8))
        frames = np.zeros((self.steps, 16, 16, 3), np.uint8)
        frames[..., 2] = 200
        frames[:, :8, :8] = 0
        frames[:, :8, :8, 0] = 10 * count[:, None, None]
        self.images = dict(zip(CAMERAS, (frames, 255 - frames)))


def write_libero_hdf5(path, truths, control_rate=20, **replace):
    """The layout of LIBERO's files, frames upside down as the simulator draws them."""
    import h5py

    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        data.attrs["problem_info"] = json.dumps({"language_instruction": truths[0].instruction})
        data.attrs["env_args"] = json.dumps({"env_kwargs": {"control_freq": control_rate}})
        for i, truth in enumerate(truths):
            columns = {
                "actions": truth.actions,
                "rewards": np.eye(truth.steps)[-1],
                "obs/ee_states": truth.proprio[:, :6],
                "obs/gripper_states": truth.proprio[:, 6:],
                "obs/agentview_rgb": truth.images["agentview"][:, ::-1, ::-1],
                "obs/eye_in_hand_rgb": truth.images["robot0_eye_in_hand"][:, ::-1, ::-1],
            }
            for key, values in (columns | replace).items():
                data[f"demo_{i}/{key}"] = values
    return path


def encoded(frame):
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG")
    return buffer.getvalue()


def rlds_record(truth, **replace):
    """One serialised episode, as TFDS lays nested steps out."""
    columns = {
        "steps/action": truth.actions,
        "steps/observation/state": truth.proprio,
        "steps/observation/image": [encoded(x) for x in truth.images["agentview"]],
        "steps/observation/wrist_image": [encoded(x) for x in truth.images["robot0_eye_in_hand"]],
        "steps/language_instruction": [truth.instruction.encode()] * truth.steps,
        "steps/reward": np.eye(truth.steps)[-1],
        "steps/is_last": (np.arange(truth.steps) == truth.steps - 1).astype(int),
        "episode_metadata/file_path": [b"somewhere"],
    }
    record = tf_example_pb2.Example()
    for key, values in (columns | replace).items():
        feature = record.features.feature[key]
        if isinstance(values, list):
            feature.bytes_list.value.extend(values)
        elif values.dtype.kind == "f":
            feature.float_list.value.extend(values.ravel().tolist())
        else:
            feature.int64_list.value.extend(values.ravel().tolist())
    return record.SerializeToString()


def write_tfrecord(path, records):
    """With the CRCs of tensorboardX."""
    writer = RecordWriter(str(path))
    for record in records:
        writer.write(record)
    writer.close()
    return path


def write_lerobot(directory, truths, version="v3.0", video=True, fps=20, **replace):
    """A dataset of the given codebase version: lossless MP4 or PNG; version 3 has all episodes in
    one table and one video for each camera."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    keys = {camera: f"observation.images.{camera}" for camera in CAMERAS}
    numbers = {"action": 7, "observation.state": 8, "next.success": 1}
    features = {key: {"dtype": "float32", "shape": [size]} for key, size in numbers.items()}
    kind = "video" if video else "image"
    features |= {key: {"dtype": kind, "shape": [16, 16, 3]} for key in keys.values()}
    three = version == "v3.0"
    file = "chunk-{chunk_index:03d}/file-{file_index:03d}"
    episode_file = "episode_{episode_index:06d}"
    info = {
        "codebase_version": version,
        "fps": fps,
        "chunks_size": 1000,
        "features": features,
        "data_path": f"data/{file}.parquet"
        if three
        else f"data/chunk-{{episode_chunk:03d}}/{episode_file}.parquet",
        "video_path": f"videos/{{video_key}}/{file}.mp4"
        if three
        else f"videos/chunk-{{episode_chunk:03d}}/{{video_key}}/{episode_file}.mp4",
    }
    tables, rows, begin = [], [], 0
    for i, truth in enumerate(truths):
        columns = {
            "action": list(truth.actions),
            "observation.state": list(truth.proprio),
            "next.success": np.arange(truth.steps) == truth.steps - 1,
            "timestamp": np.arange(truth.steps, dtype=np.float32) / fps,
            "episode_index": np.full(truth.steps, i),
        }
        if not video:
            columns |= {
                keys[camera]: [{"bytes": encoded(x), "path": None} for x in frames]
                for camera, frames in truth.images.items()
            }
        tables.append(pa.table(columns | replace))
        rows.append(
            {"episode_index": i, "tasks": [truth.instruction], "length": truth.steps}
            | {"data/chunk_index": 0, "data/file_index": 0}
            | {
                f"videos/{key}/{name}_index": 0
                for key in keys.values()
                for name in ("chunk", "file")
            }
            | {f"videos/{key}/from_timestamp": begin / fps for key in keys.values()}
        )
        begin += truth.steps

    def path(template, episode, **fields):
        target = directory / template.format(
            chunk_index=0, file_index=0, episode_chunk=0, episode_index=episode, **fields
        )
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    groups = [list(range(len(truths)))] if three else [[i] for i in range(len(truths))]
    for group in groups:
        with pq.ParquetWriter(path(info["data_path"], group[0]), tables[0].schema) as writer:
            for i in group:
                writer.write_table(tables[i])
        for camera, key in keys.items() if video else ():
            frames = np.concatenate([truths[i].images[camera] for i in group])
            write_mp4(path(info["video_path"], group[0], video_key=key), frames, fps)
    (directory / "meta").mkdir()
    (directory / "meta/info.json").write_text(json.dumps(info))
    if three:
        pq.write_table(
            pa.Table.from_pylist(rows), path("meta/episodes/chunk-000/file-000.parquet", 0)
        )
    else:
        lines = [json.dumps({k: v for k, v in row.items() if "/" not in k}) for row in rows]
        (directory / "meta/episodes.jsonl").write_text("\n".join(lines))
    return directory


def write_mp4(path, frames, fps):
    import av

    with av.open(path, "w") as container:
        stream = container.add_stream("libx264rgb", rate=fps, options={"qp": "0", "g": "7"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "rgb24"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
