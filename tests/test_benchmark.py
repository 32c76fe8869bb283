"""The benchmark command works; its figures are not tested."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from suite import LONG

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(os.name == "nt", reason="it needs resource limits and load figures of Unix")
@pytest.mark.timeout(LONG)
@pytest.mark.nightly
def test_every_measure_gives_a_number(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "--quick", "--out", str(tmp_path), "--environments", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LONG, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((tmp_path / "benchmark.json").read_text(encoding="utf-8"))

    for row in (*found["rows"], *found["openai"]):
        for client, cell in row["clients"].items():
            if client != "floor":
                assert cell["value"] > 0, (row["title"], client, done.stderr)
                assert cell["ratio"] > 0, (row["title"], client, done.stderr)
    assert len(found["growth"]) == 6, done.stderr
    for curve in found["growth"]:
        assert all(each > 0 for each in curve["cpu"]), curve
        assert all(map(math.isfinite, curve["exponents"].values())), curve

    text = (tmp_path / "benchmark.md").read_text(encoding="utf-8")
    assert done.stdout.strip() == text.strip()
    for measured in (*found["rows"], *found["openai"], *found["growth"]):
        assert f"| {measured['title']} |" in text
    for name in ("benchmark.svg", "growth.svg"):
        assert ET.parse(tmp_path / name).getroot().tag.endswith("svg")
