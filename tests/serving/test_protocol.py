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


def scalar_of(data, dtype):
    return msgpack.packb({b"__npgeneric__": True, b"data": data, b"dtype": dtype})


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
        (array_of(shape=[2**64 - 1]), "dimension"),
        (array_of(shape=[2**63, 0]), "dimension"),
        (scalar_of([1], "<f4"), "is a number"),
        (scalar_of(300, "|u1"), "300 is no uint8"),
        (scalar_of(-1, "|u1"), "-1 is no uint8"),
        (scalar_of(2**64 - 1, "<i8"), "18446744073709551615 is no int64"),
        (scalar_of(float("inf"), "<i8"), "inf is no int64"),
        (scalar_of(float("nan"), "<i4"), "nan is no int32"),
        (scalar_of(2.5, "<i4"), "2.5 is no int32"),
        (scalar_of(2, "|b1"), "2 is no bool"),
        (scalar_of(1e39, "<f4"), "1e\\+39 is no float32"),
        (scalar_of(70000, "<f2"), "70000 is no float16"),
    ],
)
def test_what_is_malformed_is_a_value_error(data, complaint):
    with pytest.raises(ValueError, match=complaint):
        unpack(data)


def test_objects_are_not_packed():
    with pytest.raises(TypeError, match="plain values"):
        pack({"x": np.array([object()])})


@given(
    st.sampled_from("?bBhHiIqQefd"),
    st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.none() | st.binary(),
)
def test_a_scalar_is_of_its_type_and_near_its_value_or_a_value_error(code, value):
    with contextlib.suppress(ValueError):
        scalar = unpack(scalar_of(value, np.dtype(code).str))
        assert scalar.dtype == np.dtype(code)
        assert np.isclose(float(scalar), value, rtol=1e-3, atol=1e-7, equal_nan=True)


@given(
    st.sampled_from("?bBhHiIqQefd"),
    st.lists(st.integers(-1, 3) | st.integers(0, 2**64 - 1), max_size=70),
    st.binary(max_size=64),
)
def test_an_array_is_what_it_says_or_a_value_error(code, shape, data):
    with contextlib.suppress(ValueError):
        array = unpack(array_of(dtype=np.dtype(code).str, shape=shape, data=data))
        assert array.shape == tuple(shape)


@given(st.binary(max_size=200))
def test_no_bytes_do_anything_but_decode_or_raise_a_value_error(data):
    with contextlib.suppress(ValueError):
        unpack(data)
