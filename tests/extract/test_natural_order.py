"""The order of the images of a folder."""

import random
import re

from clip_adapter.extract.datasets.image_files import natural_order


def parts(name: str) -> tuple[list[tuple[int, int, str]], str]:
    """Numbers by their value, before text; equal ones by the name as it is written."""
    found = re.findall(r"[0-9]+|[^0-9]+", name)
    numbers = [part.lstrip("0") or "0" if part[0].isdigit() else part for part in found]
    return [(0, len(part), part) if part[0].isdigit() else (1, 0, part) for part in numbers], name


def test_numbers_are_compared_as_numbers() -> None:
    ordered = ["07", "7", "10", "a", "a2", "a02b", "a10", "a/2", "a/10", "ab", "b"]
    assert sorted(reversed(ordered), key=natural_order) == ordered
    rng = random.Random(0)
    letters = "ab/.- Zé\x01\x02\x7f\udcff\U0001f60000012389"
    names = ["".join(rng.choices(letters, k=rng.randrange(10))) for _ in range(20_000)]
    assert sorted(names, key=natural_order) == sorted(names, key=parts)


def test_longer_numbers_than_an_integer_may_be() -> None:
    huge = "9" * 1_200_000
    assert sorted([f"a{huge}", f"a{huge[1:]}8", "a2"], key=natural_order)[0] == "a2"
