"""The plan as a picture: labels and lines do not overlap, for any models and machine."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import graftage_m4
from graftage.footprint import Layer, Shape
from graftage_m4 import _plan

if TYPE_CHECKING:
    from graftage_m4._policy import Policy

ASSETS = Path(__file__).parent / "assets"
SMALL = Shape(weights=2_500_000_000, layers=(Layer(cell=8 * 256),) * 36, embedding=2560, heads=32, vocabulary=151_936)
LARGE = Shape(weights=42_500_000_000, layers=(Layer(cell=8 * 256),) * 80, embedding=8192, heads=64, vocabulary=128_256)
SPACE = "{http://www.w3.org/2000/svg}"


def small_mac() -> tuple[Policy, _plan.Mac]:
    """Read a Mac with 16 GB."""
    policy = graftage_m4.M4(machine=ASSETS / "mini-16-macos15.json").policy()
    assert policy is not None
    mac = _plan.read_mac(policy)
    assert mac is not None
    return policy, mac


def drawn(models: dict[str, Shape], live: int | None = None, **changed: Any) -> ET.Element:
    """Draw models on a Mac with 16 GB."""
    policy, mac = small_mac()
    return ET.fromstring(_plan.picture(models, replace(mac, live=live, **changed), policy))


def text_of(root: ET.Element, begins: str) -> ET.Element:
    return next(each for each in root.iter(f"{SPACE}text") if (each.text or "").startswith(begins))


class TestPicture:
    @pytest.mark.parametrize("live", [10_370_000_000, 10_200_000_000, 5_000_000_000, 0])
    def test_labels_do_not_overlap(self, live: int) -> None:
        root = drawn({"m:1": SMALL}, live)
        budget, free = (float(text_of(root, begins).attrib["y"]) for begins in ("budget 10.4 GB", "free now"))
        assert free - budget >= 15

    def test_line_leaving_top_is_marked(self) -> None:
        root = drawn({"large:70b": LARGE, "small:4b": SMALL})
        assert text_of(root, "large:70b").text == "large:70b (above: 90.5 GB)"
        assert text_of(root, "small:4b").text == "small:4b"
        assert len(root.findall(f"{SPACE}path")) == 1
        lines = [line.attrib["points"].split() for line in root.iter(f"{SPACE}polyline")]
        tops = sorted(sum(point.endswith(",50.0") for point in points) for points in lines)
        assert tops == [0, 1], "no line runs along the edge"

    def test_size_follows_names(self) -> None:
        name = "owner/" + "long-" * 20 + "name:30b"
        few, many = drawn({name: SMALL}), drawn({f"m{number}:1": SMALL for number in range(60)})
        label, width = text_of(few, name), float(few.attrib["viewBox"].split()[2])
        text = label.text or ""
        assert text.startswith(name)
        assert float(label.attrib["x"]) + 7 * len(text) < width
        heights = sorted(
            float(each.attrib["y"]) for each in many.iter(f"{SPACE}text") if (each.text or "").startswith("m")
        )
        assert all(above + 14 <= below for above, below in pairwise(heights))
        assert 0 < heights[0] < heights[-1] < float(many.attrib["viewBox"].split()[3])

    def test_control_characters_are_replaced(self) -> None:
        root = drawn({"a\x1b[2J\x00\ud800&<b>:1": SMALL}, title="Apple\x07 M4")
        assert text_of(root, "a?[2J??&<b>:1").text
        assert "Apple? M4" in (text_of(root, "Memory").text or "")

    def test_empty_budget_can_be_drawn(self) -> None:
        policy, mac = small_mac()
        empty = replace(mac, live=0, budget=replace(mac.budget, static=0))
        assert ET.fromstring(_plan.picture({"m:1": SMALL}, empty, policy)).tag == f"{SPACE}svg"


@pytest.mark.parametrize(("share", "verdict"), [(0.85, "fits"), (0.95, "tight"), (1.05, "no")])
def test_verdict_follows_share_of_budget(share: float, verdict: str) -> None:
    policy, mac = small_mac()
    static = int(policy.settings.footprint(SMALL, 4096).total / share)
    mac = replace(mac, live=None, budget=replace(mac.budget, static=static))
    ((cell,),) = (row.cells for row in _plan.rows({"m:1": SMALL}, mac, policy, [4096]))
    assert cell.verdict == verdict
