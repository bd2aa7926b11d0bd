"""Files that are there completely or not at all, however their writing ends."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "w") -> Iterator[IO]:
    """An open file that takes the place of `path` when the block ends; a kill or an error before
    that leaves what there was. Until then it lies beside `path` and ends in ".tmp".

    Args:
        mode: "w" for text, "wb" for bytes.
    """
    unfinished = Path(path).with_suffix(".tmp")
    with unfinished.open(mode) as file:
        yield file
    unfinished.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Writes a value that JSON has to `path`, indented, by `atomic_write`."""
    with atomic_write(path) as file:
        file.write(json.dumps(value, indent=1))
