from __future__ import annotations

import pytest

from maskft.errors import UserError
from maskft.plan.sizes import parse_size, readable


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * 10**9),
        ("80 GiB", 80 * 2**30),
        ("40000MB", 4 * 10**10),
        ("1.5tb", 15 * 10**11),
        (" 512mib ", 2**29),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["24", "GB", "24 G", "a lot", "-3GB", "0GB", "24GB!", ""])
def test_no_sizes(text: str) -> None:
    with pytest.raises(UserError, match=r"is no size of memory.*24GB"):
        parse_size(text)


def test_readable() -> None:
    assert [readable(n) for n in (0, 1530, 2_340_000, 1_530_000_000, 2 * 10**12)] == [
        "0.0 kB",
        "1.5 kB",
        "2.3 MB",
        "1.53 GB",
        "2.00 TB",
    ]
