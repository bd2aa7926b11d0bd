"""Messages of openpi's policy protocol: MessagePack, arrays as their bytes, dtype and shape.

A map with the key `__ndarray__` is an array, one with `__npgeneric__` a NumPy scalar; the keys of
both are byte strings (github.com/Physical-Intelligence/openpi, packages/openpi-client).
"""

from typing import Any

import msgpack
import numpy as np

SHUTTING_DOWN = "error: the server is shutting down"  # instead of an answer; another may come up

# Plain numbers only: an object array would need pickle, and a record could hide one.
_DTYPES = {np.dtype(code).str: np.dtype(code) for code in "?bBhHiIqQefd"}


def pack(message: Any) -> bytes:
    """MessagePack of nested dicts and lists with NumPy arrays and scalars.

    Raises:
        TypeError: something in it is neither plain nor an array of plain numbers.
    """
    return msgpack.packb(message, default=_encode)


def unpack(data: bytes) -> Any:
    """The inverse of `pack`; arrays are read-only views of `data`.

    Raises:
        ValueError: `data` is no MessagePack, or an array in it is not what it says.
    """
    try:
        return msgpack.unpackb(data, object_hook=_decode)
    except msgpack.UnpackException as error:
        raise ValueError(f"the message is not MessagePack ({error or type(error).__name__})") from (
            error
        )


def _encode(value: Any) -> dict[bytes, Any]:
    if isinstance(value, np.ndarray | np.generic) and value.dtype.str in _DTYPES:
        header = {b"dtype": value.dtype.str}
        if isinstance(value, np.generic):
            return {b"__npgeneric__": True, b"data": value.item(), **header}
        return {b"__ndarray__": True, b"data": value.tobytes(), b"shape": value.shape, **header}
    raise TypeError(f"a message holds plain values and arrays of numbers, not {type(value)}")


def _decode(entries: dict) -> Any:
    if b"__ndarray__" in entries:
        return _array(entries)
    if b"__npgeneric__" in entries:
        return _scalar(entries)
    return entries


def _scalar(entries: dict) -> np.generic:
    dtype, value = _dtype(entries), entries.get(b"data")
    if not isinstance(value, bool | int | float):
        raise ValueError(f"a scalar's data is a number, not {type(value).__name__}")
    try:
        with np.errstate(over="ignore"):
            scalar = dtype.type(value)
    except (OverflowError, ValueError) as error:
        raise ValueError(f"the scalar {value!r} is no {dtype}") from error
    # A real number may be rounded, but not to infinity; any other is what was sent.
    if scalar.item() != value and (dtype.kind != "f" or np.isinf(scalar)):
        raise ValueError(f"the scalar {value!r} is no {dtype}")
    return scalar


def _array(entries: dict) -> np.ndarray:
    dtype, data, shape = _dtype(entries), entries.get(b"data"), entries.get(b"shape")
    if not isinstance(data, bytes):
        raise ValueError("an array's data is a byte string")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise ValueError(f"an array's shape is a list of sizes, not {shape!r:.80}")
    if len(data) % dtype.itemsize:
        raise ValueError(f"{len(data)} bytes are no whole number of {dtype}")
    return np.frombuffer(data, dtype).reshape(shape)


def _dtype(entries: dict) -> np.dtype:
    name = entries.get(b"dtype")
    if not isinstance(name, str) or name not in _DTYPES:
        raise ValueError(f"arrays of dtype {name!r:.80} are not read; use {', '.join(_DTYPES)}")
    return _DTYPES[name]
