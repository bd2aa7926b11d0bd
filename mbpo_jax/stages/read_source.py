"""Anyone's dataset, read and judged: what its episodes are, and which of them can be imported."""

import dataclasses
import hashlib
import importlib
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from mbpo_jax.data.formats import summary
from mbpo_jax.data.formats.conversion import Facts, Layout, convert, describe
from mbpo_jax.data.formats.recording import Entry, Names
from mbpo_jax.envs.suites import SUITES, task_info
from mbpo_jax.episode import Episode
from mbpo_jax.stages.build import Config, observation_builder, robot
from mbpo_jax.stages.workspace import StageError

FORMATS = ("libero_hdf5", "rlds", "lerobot")  # modules of mbpo_jax.data.formats
CONTACT_SHEET = "contact_sheet.png"
SHEET_EPISODES = 12


@dataclasses.dataclass(frozen=True)
class Import:
    """A dataset to be read.

    Attributes:
        format: one of FORMATS.
        source: where it is.
        renames, given: as for `Names`.
        ranges, orientation: as in `Layout`.
        skip_bad: leaves bad episodes out.
        successes_only: leaves failures out.
    """

    format: str
    source: Path
    renames: Mapping[str, str]
    skip_bad: bool
    successes_only: bool = True
    given: Mapping[str, str | bool] = dataclasses.field(default_factory=dict)
    ranges: tuple[tuple[str, float, float], ...] = ()
    orientation: str = ""

    def layout(self, config: Config) -> Layout:
        """What the config asks of an episode.

        Raises:
            StageError: a range is of no action dimension of the robot, or one has two ranges.
            ValueError: the config's robot contradicts itself.
        """
        embodiment = robot(config)
        names = [name for name, _, _ in self.ranges]
        for name in names:
            if names.count(name) > 1:
                raise StageError(f"--range of {name!r} is given {names.count(name)} times")
            if name not in embodiment.actions:
                raise StageError(
                    f"--range of {name!r}: the robot {embodiment.name} has no such action "
                    f"dimension, but {', '.join(embodiment.actions)}"
                )
        return Layout(
            suite=config.suite,
            cameras=tuple(config.cameras),
            image_size=config.image_size,
            chunk=config.chunk,
            render_every=config.demonstrations.render_every,
            robot=embodiment,
            orientation=self.orientation,
            ranges=self.ranges,
        )

    def entries(self, config: Config) -> list[Entry]:
        """The source's recordings, unread.

        Raises:
            StageError: the format's reader is not installed, the source has another format, or a
                rename is to nothing that there is.
        """
        try:
            module = importlib.import_module(f"mbpo_jax.data.formats.{self.format}")
        except ModuleNotFoundError as error:
            raise StageError(
                f"reading {self.format} needs the package {error.name}: pip install -e '.[import]'"
            ) from error
        if not self.source.exists():
            raise StageError(f"there is nothing at {self.source}")
        try:
            return module.entries(self.source, Names(config.cameras, self.renames, self.given))
        except ValueError as error:
            raise StageError(str(error)) from error

    def fingerprint(self, config: Config) -> str:
        """Differs for another import, another config, and files that were changed."""
        files = self.source.rglob("*") if self.source.is_dir() else [self.source]
        stats = sorted(
            (str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files if p.is_file()
        )
        what = (self.format, tuple(self.renames.items()), sorted(self.given.items()), stats)
        what = (*what, self.layout(config), config.tasks, self.successes_only)
        return hashlib.sha256(repr(what).encode()).hexdigest()[:16]


def survey(config: Config, job: Import, workdir: Path) -> str:
    """Reads and checks everything, writes a contact sheet of first frames into `workdir` and
    nothing else; returns the summary.

    Raises:
        StageError: episodes are bad and not skipped (the message has all their problems), or none
            is left.
    """
    entries = job.entries(config)
    chosen = summary.spread(len(entries), SHEET_EPISODES)
    facts: list[Facts] = []
    shown: dict[str, Episode] = {}

    def store(number, found, episode):
        facts.append(found)
        if episode is not None and number in chosen:
            shown[found.name] = episode

    read_entries(entries, config, job, (), store)
    text = judge(facts, config, job)
    if shown:
        workdir.mkdir(parents=True, exist_ok=True)
        summary.write_contact_sheet(workdir / CONTACT_SHEET, shown)
        text += f"\ncontact sheet {workdir / CONTACT_SHEET}"
    return text


def read_entries(
    entries: Sequence[Entry],
    config: Config,
    job: Import,
    finished: Container[int],
    store: Callable[[int, Facts, Episode | None], None],
) -> None:
    """Calls `store` with the number of every unfinished entry, what is in it, and its episode if
    it is kept."""
    layout, wanted = job.layout(config), wanted_tasks(config)
    bad = 0
    with tqdm(entries, desc="reading", unit="ep") as bar:
        for number, entry in enumerate(bar):
            if number in finished:
                continue
            facts, episode = _read_entry(entry, layout, wanted)
            if job.successes_only and facts.success is False and not facts.left_out:
                facts.left_out = summary.FAILED
            bad += bool(facts.problems)
            bar.set_postfix(bad=bad)
            store(number, facts, episode if facts.kept else None)


def _read_entry(
    entry: Entry, layout: Layout, wanted: Mapping[str, int] | None
) -> tuple[Facts, Episode | None]:
    try:
        recording = entry.read()
    except ValueError as error:
        return Facts(entry.name, [str(error)]), None
    if recording.instruction and wanted is not None and plain(recording.instruction) not in wanted:
        facts = describe(entry.name, recording)
        facts.left_out = f"{recording.instruction!r}: not among the config's tasks"
        return facts, None
    return convert(entry.name, recording, layout)


def judge(facts: list[Facts], config: Config, job: Import) -> str:
    """What there is to tell of all episodes.

    Raises:
        StageError: as `survey`.
    """
    text, problems = summary.summarize(facts), summary.report_problems(facts)
    budgets = observation_builder(config).prompt_problems
    for warning in summary.warnings(facts, robot(config), budgets):
        text += f"\nwarning: {warning}"
    if problems and not job.skip_bad:
        raise StageError(
            f"{problems}\n\n{text}\n\nNothing is imported. --skip_bad leaves them out; --map, "
            "--range and the config's robot say in what a source is different"
        )
    if problems:
        text = f"{problems}\n\n{text}"
    if not any(f.kept for f in facts):
        raise StageError(f"nothing is left to import\n{text}")
    return text


def wanted_tasks(config: Config) -> dict[str, int] | None:
    """Plain instruction -> number of the config's tasks; None for a suite that is no simulator's,
    where every task is wanted."""
    if config.suite not in SUITES:
        return None
    return {plain(task_info(config.suite, t).instruction): t for t in config.tasks}


def plain(instruction: str) -> str:
    """An instruction as it is compared: lower case, single spaces."""
    return " ".join(instruction.lower().split())
