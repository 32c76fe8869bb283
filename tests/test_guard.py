"""What an import, a connection and a call cost, in our calls and lines, so that growth is seen.

Counts, not times, so that load and other packages do not change them. `python tests/test_guard.py > tests/guard.json`
records them as they are now. Lines are compared only on the version of Python that recorded them.
"""

from __future__ import annotations

import ast
import asyncio
import json
import os
import subprocess
import sys
import tomllib
from collections import Counter
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest
from counting import MODEL, Count, Pace, http
from places import M4, ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from importlib.machinery import ModuleSpec

pytestmark = pytest.mark.slow

KEPT = Path(__file__).with_name("guard.json")
RENEW = "python tests/test_guard.py > tests/guard.json"
ALLOWED = 0.03
SHARE = ALLOWED / 10
"""The least share of a figure that a function needs to be kept."""
KINDS = ("calls", "lines")
SHORT, PLAIN, LONG = 1, 20, 201
MORE = f"{LONG - SHORT} chunks more"
PROCESSES, TIMES = 2, 3
"""The smallest of these counts is kept: a policy may check the machine, and a thread may end late."""
NOWHERE = "http://127.0.0.1:9"
HERE = f"{sys.version_info.major}.{sys.version_info.minor}"
DISTRIBUTIONS = [ROOT / "core", *sorted(ROOT.glob("providers/*")), *sorted(ROOT.glob("plugins/*"))]
Parts: TypeAlias = dict[str, list[int]]
"""Calls and lines by function."""


# --- Measuring, in a separate process --------------------------------------------------------------------------------


class _Finder:
    """A finder of modules in this tree and the former `sys.path`, so that other metadata is off the path."""

    places: list[str]

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, cls.places if path is None else path, target)


def _isolate(folder: Path, disabled: str) -> None:
    """Let only this tree count: installed packages, variables and settings change what a client reads."""
    _Finder.places = [*map(str, DISTRIBUTIONS), *sys.path]
    sys.meta_path.insert(0, _Finder)
    sys.path[:] = [str(folder / "site")]
    kept = {name: value for name, value in os.environ.items() if name in ("PATH", "SYSTEMROOT")}
    os.environ.clear()
    os.environ.update(kept | dict.fromkeys(("HOME", "USERPROFILE"), str(folder / "home")))
    os.environ["GRAFTAGE_CONFIG"] = str(folder / "home" / "none.toml")
    os.environ["GRAFTAGE_DISABLED_PLUGINS"] = disabled
    os.environ["GRAFTAGE_M4_MACHINE"] = str(M4 / "mini-16-macos15.json")


def _parts(count: Count) -> Parts:
    return {name: [count.calls[name], count.lines[name]] for name in {*count.calls, *count.lines}}


def _total(parts: Parts) -> list[int]:
    return [sum(each[kind] for each in parts.values()) for kind in range(len(KINDS))]


def _begin(count: Count, *, plugins: bool) -> dict[str, Parts]:
    """Measure what only a fresh process does."""
    found: dict[str, Parts] = {}
    with count:
        import graftage
    found["import"] = _parts(count)
    for name in ("first connect", "second connect") if plugins else ("first connect without plugins",):
        with count:
            client = graftage.connect("ollama", model=MODEL, host=NOWHERE)
        found[name] = _parts(count)
        client.close()
    return found


def _object(value: Any) -> Any:
    from graftage_ollama.testing import Answer

    body = json.dumps(value).encode()
    return Answer(raw=http("json", f"content-length: {len(body)}") + body, ending="keep")


def _more(long: Parts, short: Parts) -> Parts:
    more = {name: [now - short.get(name, [0, 0])[kind] for kind, now in enumerate(each)] for name, each in long.items()}
    return {name: each for name, each in more.items() if any(each)}


class _Warm:
    """A client that has made each call before."""

    def __init__(self, count: Count, fake: Any, pace: Pace, llm: Any, run: Callable[[Any], Any]) -> None:
        self._count = count
        self._fake = fake
        self._pace = pace
        self._llm = llm
        self._run = run

    def chat(self) -> Parts:
        return self._least(lambda: self._pace.script(PLAIN), lambda: self._run(self._llm.chat("Hello")))

    def chunks(self, read: Callable[[Any], Any]) -> Parts:
        def stream(chunks: int) -> Parts:
            return self._least(
                lambda: self._pace.script(chunks), lambda: self._run(read(self._llm.chat("Hello", stream=True)))
            )

        return _more(stream(LONG), stream(SHORT))

    def embed(self) -> Parts:
        answer = _object({"model": MODEL, "embeddings": [[0.5, 1.0]] * 2})
        return self._least(
            lambda: self._fake.script("/api/embed", answer), lambda: self._run(self._llm.embed(["a", "b"]))
        )

    def health(self) -> Parts:
        answer = _object({"version": "0.9.3"})
        return self._least(
            lambda: self._fake.script("/api/version", answer), lambda: self._run(self._llm.health(max_age=0))
        )

    def _least(self, prepare: Callable[[], None], work: Callable[[], Any]) -> Parts:
        found = []
        for _ in range(1 + TIMES):
            prepare()
            with self._count:
                work()
            found.append(_parts(self._count))
        # The first call does more, which is not counted.
        return min(found[1:], key=_total)


async def _read(stream: Any) -> None:
    async for _ in await stream:
        pass


def _repeat(count: Count, *, plugins: bool) -> dict[str, Parts]:
    """Measure what a process does repeatedly."""
    import graftage
    from graftage_ollama.testing import FakeOllama

    found: dict[str, Parts] = {}
    with FakeOllama() as fake, Pace(fake) as pace:
        # Otherwise a policy checks each time whether the model fits.
        fake.loaded = list(fake.models)
        with graftage.connect("ollama", model=MODEL, host=fake.url) as llm:
            warm = _Warm(count, fake, pace, llm, lambda done: done)
            if plugins:
                return {"chat with plugins": warm.chat()}
            found |= {"chat": warm.chat(), MORE: warm.chunks(list), "embed": warm.embed(), "health": warm.health()}
        # The same kind of loop on each system. Before 3.13, `Runner.run` also formats the result.
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            run = runner.get_loop().run_until_complete
            with_loop = graftage.connect_async("ollama", model=MODEL, host=fake.url)
            warm = _Warm(count, fake, pace, run(with_loop.__aenter__()), run)
            found |= {"chat, async": warm.chat(), f"{MORE}, async": warm.chunks(_read)}
            run(with_loop.close())
    return found


def _measure(folder: str, disabled: str) -> dict[str, Parts]:
    _isolate(Path(folder), disabled)
    count = Count()
    with count.watching(lines=True):
        return _begin(count, plugins=not disabled) | _repeat(count, plugins=not disabled)


# --- The figures -----------------------------------------------------------------------------------------------------


@cache
def figures() -> dict[str, Parts]:
    """Return each figure by function, the smallest of several processes."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    found: dict[str, Parts] = {}
    with TemporaryDirectory() as folder:
        _install(Path(folder, "site"))
        Path(folder, "home").mkdir()
        commands = [[sys.executable, __file__, "--measure", folder, disabled] for disabled in ("", "lora,m4")]
        processes = [
            subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) for command in commands * PROCESSES
        ]
        outputs = [process.communicate()[0] for process in processes]
    assert not any(process.returncode for process in processes)
    for output in outputs:
        for name, parts in json.loads(output).items():
            found[name] = min(found.get(name, parts), parts, key=_total)
    return found


def _install(site: Path) -> None:
    """Write the metadata of this tree's distributions, as an installer does."""
    # Not imported, since the cost of the first import is measured.
    version = ast.literal_eval((ROOT / "core/graftage/_version.py").read_text(encoding="utf-8").rpartition("= ")[2])
    for folder in DISTRIBUTIONS:
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        info = site / f"{project['name'].replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        needs = [f"Requires-Dist: {each}\n" for each in project["dependencies"]]
        head = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {version}\n"
        (info / "METADATA").write_text(head + "".join(needs), encoding="utf-8")
        groups = project.get("entry-points", {}).items()
        points = [f"[{group}]\n" + "".join(f"{name} = {at}\n" for name, at in each.items()) for group, each in groups]
        (info / "entry_points.txt").write_text("".join(points), encoding="utf-8")


def _text(found: dict[str, Parts]) -> str:
    """Format the figures to keep, with a line for each function."""
    totals = {figure: dict(zip(KINDS, _total(parts), strict=True)) for figure, parts in sorted(found.items())}
    rows: dict[str, dict[str, list[int]]] = {}
    for figure, total in totals.items():
        for name, each in found[figure].items():
            if any(part > whole * SHARE for part, whole in zip(each, total.values(), strict=True)):
                rows.setdefault(name, {})[figure] = each
    return f'{{"python": "{HERE}",\n"totals": {_lines(totals)},\n"functions": {_lines(rows)}}}\n'


def _lines(rows: dict[str, Any]) -> str:
    return "{\n" + ",\n".join(f" {json.dumps(name)}: {json.dumps(rows[name])}" for name in sorted(rows)) + "\n}"


def _grown(kept: dict[str, Any], found: dict[str, Parts]) -> Iterator[str]:
    """Describe what has grown too much, and which functions most."""
    for kind, word in enumerate(KINDS):
        if word == "lines" and kept["python"] != HERE:
            continue
        for figure, parts in sorted(found.items()):
            now, before = _total(parts)[kind], kept["totals"].get(figure, {}).get(word, 0)
            if now > before * (1 + ALLOWED):
                yield f"{figure}: {now} {word} instead of {before}; functions that grew most:"
                yield from _where(kept["functions"], figure, parts, kind)


def _where(kept: dict[str, Any], figure: str, parts: Parts, kind: int) -> Iterator[str]:
    more = Counter({name: each[kind] - kept.get(name, {}).get(figure, [0, 0])[kind] for name, each in parts.items()})
    least = _total(parts)[kind] * SHARE
    yield from (
        f"    {name}: {parts[name][kind]}, {extra} more" for name, extra in more.most_common(5) if extra > least
    )


def test_costs_do_not_grow() -> None:
    grown = "\n".join(_grown(json.loads(KEPT.read_text(encoding="utf-8")), figures()))
    assert not grown, f"{grown}\nIf this is intended: {RENEW}"


BEFORE: dict[str, Parts] = {"chat": {"a:f": [50, 900], "a:g": [50, 100]}}


def _report(now: dict[str, Parts], python: str = HERE) -> list[str]:
    return list(_grown(json.loads(_text(BEFORE)) | {"python": python}, now))


class TestReport:
    def test_lower_costs_pass(self) -> None:
        assert _report({"chat": {"a:f": [40, 800], "a:g": [50, 100]}}) == []

    def test_small_growth_passes(self) -> None:
        assert _report({"chat": {"a:f": [52, 929], "a:g": [51, 101]}}) == []

    def test_growth_names_its_functions(self) -> None:
        assert _report({"chat": {"a:f": [52, 900], "a:g": [50, 100], "a:h": [3, 6]}}) == [
            "chat: 105 calls instead of 100; functions that grew most:",
            "    a:h: 3, 3 more",
            "    a:f: 52, 2 more",
        ]

    def test_lines_need_the_same_python(self) -> None:
        now: dict[str, Parts] = {"chat": {"a:f": [50, 2000], "a:g": [50, 100]}}
        assert (len(_report(now)), _report(now, python="3.0")) == (2, [])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(_measure(*sys.argv[2:])))
    else:
        print(_text(figures()), end="")
