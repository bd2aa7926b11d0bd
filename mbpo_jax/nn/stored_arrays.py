"""Whether a folder of arrays that Orbax wrote can be read.

Asked before Orbax is, which tells the loss of a file by bare exceptions, pages long, partly from
other threads and after it has returned.
"""

import json

import jax
import numpy as np
import tensorstore
from etils import epath

_DATABASE = ("manifest.ocdbt", "ocdbt.process_0")  # without them an array has a folder of its own
_DETAIL = 240  # characters of a library's message that are shown


def check_readable(
    directory: epath.Path, remedy: str
) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    """Reads every array of the folder, one at a time, and returns their shapes by their keys.

    Args:
        directory: absolute and there; local or `gs://`.
        remedy: what to do about a damaged one, the end of the message.

    Raises:
        ValueError: a file is lost, empty, cut or of other bytes, or an array has values that are
            not finite; names the array, where it is known.
    """
    try:
        listed = json.loads((directory / "_METADATA").read_text())
        driver = "zarr3" if listed.get("use_zarr3") else "zarr"
        keys = [
            tuple(str(entry["key"]) for entry in leaf["key_metadata"])
            for leaf in listed["tree_metadata"].values()
            if not leaf["value_metadata"].get("skip_deserialize")
        ]
        if not keys:
            raise ValueError("it lists no arrays")
    except Exception as error:  # whatever becomes of bytes that are another file's
        raise _damaged(directory, "its file _METADATA", error, remedy) from error
    found = {}
    for key in keys:
        name = ".".join(key)
        spec = {
            "driver": driver,
            "kvstore": _place(directory, name),
            "fill_missing_data_reads": False,  # a lost piece is an error, not zeros
        }
        try:
            array = tensorstore.open(spec, read=True, open=True).result().read().result()
            if not np.isfinite(array).all():
                raise ValueError("it has values that are not finite")
        except Exception as error:
            raise _damaged(directory, f"the array {name}", error, remedy) from error
        found[key] = jax.ShapeDtypeStruct(array.shape, array.dtype)
    return found


def _place(directory: epath.Path, name: str) -> str | dict:
    base = str(directory) if "://" in str(directory) else f"file://{directory}"
    if any((directory / file).exists() for file in _DATABASE):
        return {"driver": "ocdbt", "base": f"{base}/", "path": f"{name}/"}
    return f"{base}/{name}/"


def _damaged(directory: epath.Path, part: str, error: Exception, remedy: str) -> ValueError:
    detail = " ".join(str(error).split("[tensorstore_spec")[0].split())[:_DETAIL]
    return ValueError(
        f"{directory} is incomplete or corrupt: {part} cannot be read "
        f"({detail or type(error).__name__}); {remedy}"
    )
