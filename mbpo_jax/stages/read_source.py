"""Anyone's dataset, read and judged: what its episodes are, and which of them can be imported."""

from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from mbpo_jax.data.formats import summary
from mbpo_jax.data.formats.conversion import Facts, Layout, convert, describe
from mbpo_jax.data.formats.recording import Entry
from mbpo_jax.data.pipelines import spread
from mbpo_jax.envs.suites import SUITES, task_info
from mbpo_jax.episode import Episode
from mbpo_jax.stages.build import Config, observation_builder, robot
from mbpo_jax.stages.import_source import Import
from mbpo_jax.stages.workspace import StageError

CONTACT_SHEET = "contact_sheet.png"
SHEET_EPISODES = 12


def survey(config: Config, job: Import, workdir: Path) -> str:
    """Reads and checks everything, writes a contact sheet of first frames into `workdir` and
    nothing else; returns the summary.

    Raises:
        StageError: episodes are bad and not skipped (the message has all their problems), or none
            is left.
    """
    entries = job.entries(config)
    chosen = spread(len(entries), SHEET_EPISODES)
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
