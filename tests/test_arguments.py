import argparse

import pytest

from experiments.arguments import number, numbers


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "nan", "inf", "x", "", "101"])
def test_what_is_out_of_range_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="from 1 to 100"):
        number(int, 1, 100)(text)
    with pytest.raises(argparse.ArgumentTypeError):
        numbers(1, 100)(f"1,{text}")


def test_numbers_are_read():
    assert number(int, 1)("7") == 7
    assert number(float, 0.001)("0.5") == 0.5
    assert numbers(1)("1,8") == [1, 8]
