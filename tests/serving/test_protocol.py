import contextlib

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from mbpo_jax.serving.protocol import pack, unpack

NUMBERS = st.sampled_from("?bBhHiIqQefd").flatmap(
    lambda code: npst.arrays(code, npst.array_shapes(min_dims=0, max_dims=4, min_side=0))
)


@given(NUMBERS)
def test_arrays_come_back_bit_for_bit(array):
    again = unpack(pack({"x": [array, "text", 3]}))["x"]
    assert again[1:] == ["text", 3]
    assert (again[0].dtype, again[0].shape) == (array.dtype, array.shape)
    assert again[0].tobytes() == array.tobytes()


def test_a_numpy_scalar_keeps_its_type():
    again = unpack(pack(np.float32(0.5)))
    assert isinstance(again, np.float32)
    assert again == 0.5


def array_of(**changes):
    entries = {"__ndarray__": True, "data": b"\0" * 8, "dtype": "<f4", "shape": [2], **changes}
    return msgpack.packb({key.encode(): value for key, value in entries.items()})


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "incomplete"),
        (b"\xc1", "not MessagePack"),
        (b"\x81" * 5000, "not MessagePack"),
        (pack({"a": 1})[:-1], "incomplete"),
        (pack(1) + b"\0", "extra data|not MessagePack"),
        (array_of(dtype="|O"), "dtype '|O'"),
        (array_of(dtype="i4,i4"), "are not read"),
        (array_of(dtype=7), "are not read"),
        (array_of(data=b"\0" * 7), "whole number of"),
        (array_of(data="text"), "byte string"),
        (array_of(shape=[3]), "reshape"),
        (array_of(shape=[-1]), "list of sizes"),
        (array_of(shape=[2**40, 0]), "reshape"),
        (msgpack.packb({b"__npgeneric__": True, b"data": [1], b"dtype": "<f4"}), "is a number"),
    ],
)
def test_what_is_malformed_is_a_value_error(data, complaint):
    with pytest.raises(ValueError, match=complaint):
        unpack(data)


def test_objects_are_not_packed():
    with pytest.raises(TypeError, match="plain values"):
        pack({"x": np.array([object()])})


@given(st.binary(max_size=200))
def test_no_bytes_do_anything_but_decode_or_raise_a_value_error(data):
    with contextlib.suppress(ValueError):
        unpack(data)
