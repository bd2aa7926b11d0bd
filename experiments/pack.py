"""Packs what stages need of a run into one small file, to run them on another machine.

    python -m experiments.pack --workdir=RUN --for=world_model,value,improve --out=FILE.tar
    python -m experiments.unpack FILE.tar --workdir=DIR
    python -m experiments.libero_long --stages=world_model,value,improve --workdir=DIR

The file holds what the stages read of earlier ones: parameters, statistics, and datasets whose
frames are AVIF films of --quality, one for each view of an episode; and the config records and
summaries of all earlier stages. Training states, metrics and pictures stay behind. Packing tells
how far the frames have changed (PSNR); everything else comes back as it was.
"""

import argparse
import dataclasses
import hashlib
import io
import json
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageSequence

from mbpo_jax.data.episodes import iterate_episodes, write_episodes
from mbpo_jax.episode import Episode
from mbpo_jax.stages.workspace import StageError, Workspace, read_config

# Of each stage, in their order: what it reads of the folders of others.
_SFT = {"sft": ("norm_stats.json", "policy")}
_DATA = {"demonstrations": ("dataset",), "rollouts": ("dataset",)}
_WORLD = {"world_model": ("world_model",)}
_VALUE = {"value": ("critic",)}
_IMPROVED = {"improve": ("policy",)}
NEEDS = {
    "sft": {"demonstrations": ("dataset",)},
    "rollouts": _SFT,
    "world_model": _DATA,
    "fidelity": _DATA | _WORLD,
    "value": _DATA | _SFT | _WORLD,
    "selection": _SFT | _WORLD | _VALUE,
    "siblings": {"rollouts": ("dataset",)} | _SFT | _WORLD | _VALUE,
    "improve": _DATA | _SFT | _WORLD | _VALUE,
    "imagine": _DATA | _SFT | _WORLD | _IMPROVED,
    "evaluate": _SFT | _WORLD | _VALUE | _IMPROVED,
}
_RECORDS = ("config.json", "done.json")
_INDEX = "pack.json"  # the last file of an archive: SHA-256 of each of the others
_ARRAYS = ("timesteps", "proprio", "actions", "target_actions", "num_actions")


def pack(
    workdir: Path, stages: Sequence[str], out: Path, quality: int = 50
) -> dict[str, dict[str, float]]:
    """Writes the archive; `out` appears when it is complete.

    Args:
        quality: of the films, 0 to 100; 100 is nearly lossless.

    Returns:
        stage of a dataset -> {"episodes", "frames", "psnr": in dB over all pixels, "worst_psnr":
        of the worst frame}.

    Raises:
        StageError: a stage that `stages` read from has not finished, or `out` exists.
        ValueError: a dataset is corrupt.
    """
    workspace, out = Workspace(workdir, read_config(workdir)), Path(out)
    if out.exists():
        raise StageError(f"{out} already exists: delete it, or choose another --out")
    needed = _needed(stages)
    for name in needed:
        workspace.require(name)
    unfinished, errors = out.with_name(out.name + ".unfinished"), {}
    digests: dict[str, str] = {}
    try:
        with tarfile.open(unfinished, "w") as archive:
            for name in _packed_stages(workspace, stages, needed):
                errors[name], folder = _FrameErrors(), workspace.directory(name)
                for part in (*_RECORDS, *needed.get(name, ())):
                    for file, content in _packed(folder / part, quality, errors[name]):
                        path = f"{name}/{file.relative_to(folder)}"
                        digests[path] = _add(archive, path, content)
            index = {"stage": ",".join(stages), "quality": quality, "files": digests}
            _add(archive, _INDEX, json.dumps(index, indent=1).encode())
        unfinished.replace(out)
    finally:
        unfinished.unlink(missing_ok=True)
    return {name: x.summary() for name, x in errors.items() if x.episodes}


def unpack(archive: Path, workdir: Path) -> str:
    """Restores a working directory, which appears when it is complete; returns the stages that it
    is for, separated by commas.

    Raises:
        StageError: the archive is missing or damaged, or `workdir` exists.
    """
    archive, workdir = Path(archive), Path(workdir).absolute()
    if workdir.exists():
        raise StageError(f"{workdir} already exists: delete it, or choose another --workdir")
    if not archive.is_file():
        raise StageError(f"there is no file {archive}")
    unfinished = workdir.with_name(f".{workdir.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        index = _index(archive)
        datasets = {PurePosixPath(n).parent for n in index["files"] if _is_episode(n)}
        for name, content in _contents(archive, index):
            if not _is_episode(name):
                path = unfinished / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        for folder in sorted(datasets):
            contents = _contents(archive, index, folder)
            write_episodes(unfinished / folder, (_decoded(content) for _, content in contents))
        unfinished.replace(workdir)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, KeyError, TypeError, ValueError) as e:
        raise StageError(f"{archive} is damaged ({e}): copy or pack it again") from e
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return index["stage"]


class _FrameErrors:
    """Mean squared error of every frame of a dataset."""

    def __init__(self):
        self.episodes = 0
        self._frames: list[float] = []

    def add(self, before: np.ndarray, after: np.ndarray) -> None:
        difference = before.astype(np.float64) - after
        self._frames.append(float(np.mean(np.square(difference))))

    def summary(self) -> dict[str, float]:
        errors = {"psnr": np.mean(self._frames), "worst_psnr": np.max(self._frames)}
        psnr = {k: 10 * np.log10(255**2 / e) if e else np.inf for k, e in errors.items()}
        return {"episodes": self.episodes, "frames": len(self._frames), **psnr}


def _needed(stages: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """What the stages read of the folders of others."""
    needed: dict[str, tuple[str, ...]] = {}
    for stage in stages:
        for name, parts in NEEDS[stage].items():
            if name not in stages:
                needed[name] = tuple(dict.fromkeys((*needed.get(name, ()), *parts)))
    return needed


def _packed_stages(
    workspace: Workspace, stages: Sequence[str], needed: Collection[str]
) -> list[str]:
    """The stages that are read from, and all finished ones before the first of `stages`."""
    order = ["demonstrations", *NEEDS]
    before = order[: min(order.index(stage) for stage in stages)]
    finished = [name for name in before if workspace.summary(name) is not None]
    return [name for name in order if name in finished or name in needed]


def _packed(path: Path, quality: int, errors: _FrameErrors) -> Iterator[tuple[Path, bytes]]:
    """Name and content of a file, of all files of a folder, or of the episodes of a dataset."""
    if path.name == "dataset":
        for i, episode in enumerate(iterate_episodes(path)):
            errors.episodes += 1
            yield path / f"{i:06}.npz", _encoded(episode, quality, errors)
    elif path.is_file():
        yield path, path.read_bytes()
    else:
        for file in sorted(path.rglob("*")):
            if file.is_file():
                yield file, file.read_bytes()


def _add(archive: tarfile.TarFile, name: str, content: bytes) -> str:
    """Returns the content's SHA-256."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))
    return hashlib.sha256(content).hexdigest()


def _index(archive: Path) -> dict:
    with tarfile.open(archive, "r:") as opened:
        file = opened.extractfile(_INDEX)
        index = json.loads(file.read())
    for name in index["files"]:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(f"it names {name}, which lies outside the working directory")
    return index


def _contents(
    archive: Path, index: dict, folder: PurePosixPath | None = None
) -> Iterator[tuple[str, bytes]]:
    """Name and content of the files listed, or of those in a folder, checked."""
    with tarfile.open(archive, "r:") as opened:
        for name, digest in index["files"].items():
            if folder is not None and PurePosixPath(name).parent != folder:
                continue
            content = opened.extractfile(name).read()
            if hashlib.sha256(content).hexdigest() != digest:
                raise ValueError(f"{name} is not what was packed")
            yield name, content


def _is_episode(name: str) -> bool:
    path = PurePosixPath(name)
    return path.parent.name == "dataset" and path.suffix == ".npz"


def _encoded(episode: Episode, quality: int, errors: _FrameErrors) -> bytes:
    """An episode as .npz: its arrays, a film of each camera, and the rest as JSON."""
    arrays = {name: getattr(episode, name) for name in _ARRAYS}
    for camera, frames in episode.images.items():
        film = _film(frames, quality)
        for before, after in zip(frames, _frames(film), strict=True):
            errors.add(before, after)
        arrays[f"images/{camera}"] = np.frombuffer(film, np.uint8)
    rest = {
        field.name: getattr(episode, field.name)
        for field in dataclasses.fields(episode)
        if field.name not in (*_ARRAYS, "images")
    }
    file = io.BytesIO()
    np.savez_compressed(file, record=np.array(json.dumps(rest)), **arrays)
    return file.getvalue()


def _decoded(content: bytes) -> Episode:
    arrays = dict(np.load(io.BytesIO(content)))
    images = {}
    for name in arrays:
        if name.startswith("images/"):
            images[name.removeprefix("images/")] = _frames(arrays[name].tobytes())
    rest = json.loads(str(arrays["record"]))
    return Episode(images=images, **{name: arrays[name] for name in _ARRAYS}, **rest)


def _film(frames: np.ndarray, quality: int) -> bytes:
    """Frames [F, H, W, 3] as one film: little moves between them, so that they take less than a
    third of what single WebP pictures of the same PSNR take."""
    file = io.BytesIO()
    first, *others = map(Image.fromarray, frames)
    # Without chroma subsampling, which costs 1.6 dB at the same size. Speed 6 is 15 times slower.
    coding = {"quality": quality, "subsampling": "4:4:4", "speed": 7}
    first.save(file, "AVIF", save_all=True, append_images=others, **coding)
    return file.getvalue()


def _frames(film: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(film)) as opened:
        return np.stack(
            [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(opened)]
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, required=True, help="working directory of a run")
    parser.add_argument(
        "--for",
        dest="stages",
        type=lambda text: text.split(","),
        required=True,
        help="stages, separated by commas: " + ", ".join(NEEDS),
    )
    parser.add_argument("--out", type=Path, required=True, help="the file to be written")
    parser.add_argument("--quality", type=int, default=50, help="of AVIF, 0 to 100")
    options = parser.parse_args(arguments)
    for stage in options.stages:
        if stage not in NEEDS:
            parser.error(f"--for holds {stage!r}: choose among {', '.join(NEEDS)}")
    if not 0 <= options.quality <= 100:
        parser.error(f"--quality is {options.quality}: 0 to 100")
    try:
        found = pack(options.workdir, options.stages, options.out, options.quality)
    except (StageError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, f in found.items():
        print(
            f"{name}: {f['episodes']} episodes, {f['frames']} frames, "
            f"PSNR {f['psnr']:.1f} dB, of the worst frame {f['worst_psnr']:.1f} dB"
        )
    print(f"{options.out}: {options.out.stat().st_size / 2**20:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
