"""Links as users write them, and that they read back."""

from __future__ import annotations

import pytest

from weft.errors import InputError
from weft.links import NO_LINK, Link, links_of

LINKS = {
    "none": NO_LINK,
    "500mbit": Link(rate=5e8),
    "2.5gbit": Link(rate=2.5e9),
    "900kbit": Link(rate=9e5),
    "200mbit,5ms": Link(rate=2e8, delay=0.005),
    "none,5ms": Link(delay=0.005),
    "200mbit,shared": Link(rate=2e8, shared=True),
    "200mbit,0.5ms,shared": Link(rate=2e8, delay=0.0005, shared=True),
    "1x": Link(times=1.0),
    "0.25x,1ms": Link(times=0.25, delay=0.001),
    "shaped:200mbit": Link(rate=2e8, shaped=True),
    "shaped:2x": Link(times=2.0, shaped=True),
}


@pytest.mark.parametrize(("text", "link"), LINKS.items())
def test_links_read_and_read_back(text: str, link: Link) -> None:
    assert Link.parse(text) == link == Link.parse(str(link))
    assert link.free == (text == "none") and link.paced == (not link.free and not text.startswith("shaped"))


@pytest.mark.parametrize(
    "text",
    ["", "fast", "0mbit", "-5mbit", "5", "5 mbit", "5mbit; reboot", "0x", "x", "5ms", "shared", "none,shared",
     "200mbit,5ms,6ms", "200mbit,shared,shared", "200mbit,none", "200mbit,", "shaped:none", "shaped:200mbit,5ms",
     "shaped:", "1e9mbit", "٣mbit", "none,none"],
)  # fmt: skip
def test_what_is_no_link(text: str) -> None:
    with pytest.raises(InputError, match="--link"):
        Link.parse(text)


def test_a_list() -> None:
    assert list(map(str, links_of("none, 500mbit,5ms,0.5x,1x,shared,2gbit"))) == [
        "none", "500mbit,5ms", "0.5x", "1x,shared", "2gbit",
    ]  # fmt: skip
    assert links_of("1x,1x") == (Link(times=1.0),)
    for text in ("", "5ms", "1x,,2x", "1x,fast"):
        with pytest.raises(InputError):
            links_of(text)


def test_any_speed_reads_back_nearly() -> None:
    link = Link.parse("1x").at(123_456_789.0)
    read = Link.parse(str(link)).rate
    assert read == pytest.approx(link.rate, rel=1e-3)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("0x", "'0x' is not above zero"), ("-3mbit", "is not above zero"), ("none,0ms", "a delay of zero out"),
        ("200", "'200' has no unit, which is kbit, mbit, gbit or x"), ("200mbit,5", "'5' has no unit, which is us, ms"),
        ("5ms", "'5ms' is a delay, and the speed goes before it, as in none,5ms"), ("200mb", "'mb' is no unit"),
        ("200mbit,5ms,3ms", "'3ms' is one more speed, or one more delay"), ("200mbit,", "a part of it is empty"),
        ("FAST", "'fast' isn't known there"), ("fast", "'fast' isn't known there"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(text: str, fault: str) -> None:
    with pytest.raises(InputError) as raised:
        Link.parse(text)
    assert fault in str(raised.value) and "write it like 500mbit" in str(raised.value)
