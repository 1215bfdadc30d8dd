"""What the programs share on the command line."""

from __future__ import annotations

import pytest

from shardkv.errors import InvalidArgument
from shardkv.programs import advertised


@pytest.mark.parametrize(
    ("bind", "advertise", "address"),
    [
        ("127.0.0.1", None, "127.0.0.1:70"),
        ("::1", None, "[::1]:70"),
        ("0.0.0.0", "db.example", "db.example:70"),
        ("0.0.0.0", "fe80::1", "[fe80::1]:70"),
        ("127.0.0.1", "db.example:8000", "db.example:8000"),
        ("127.0.0.1", "[fe80::1]:8000", "[fe80::1]:8000"),
    ],
)
def test_what_others_are_told_to_connect_to(bind: str, advertise: str | None, address: str) -> None:
    assert advertised(bind, 70, advertise) == address


@pytest.mark.parametrize(("bind", "advertise"), [("0.0.0.0", None), ("127.0.0.1", "db:x"), ("127.0.0.1", "[::1]")])
def test_an_address_nobody_can_use_is_refused(bind: str, advertise: str | None) -> None:
    with pytest.raises(InvalidArgument):
        advertised(bind, 70, advertise)
