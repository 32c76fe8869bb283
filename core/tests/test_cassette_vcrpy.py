"""Cassettes of vcrpy and pytest-recording play here, and ours there."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import httpx
import pytest
import vcr  # type: ignore[import-untyped] # it has no types
from places import ROOT
from recording import ELSEWHERE, STREAM, exchange, modes, recorded
from vcr.serializers import jsonserializer, yamlserializer  # type: ignore[import-untyped]

from graftage.testing import Cassette, CassetteError
from graftage_ollama.testing import Answer, FakeOllama

if TYPE_CHECKING:
    from collections.abc import Callable

OLDEST: Final = ("vcrpy==8.2.1", "pytest-recording==0.13.0")
WRITE: Final = '''
"""Record what each library sends, with the vcrpy that is on the path, into files of a folder."""

import asyncio, io, json
import aiohttp, httpx, requests, vcr

body = {"model": "m", "n": [1, 2.5, None, True], "text": "grüß"}


def tape(name, **more):
    return vcr.use_cassette(f"{folder}/{name}", **more)


async def by_aiohttp(**given):
    async with aiohttp.ClientSession() as session, session.post(f"{url}/api/chat", **given) as answer:
        await answer.read()


with tape("binary_header.yaml"):
    requests.post(f"{url}/api/chat", json=body, headers={"X-A": b"caf\\xe9"})
with tape("object.yaml"):
    asyncio.run(by_aiohttp(json=body))
with tape("list.yaml"):
    asyncio.run(by_aiohttp(json=[body]))
with tape("decoded.yaml"):
    asyncio.run(by_aiohttp(json=body))
with tape("compressed.yaml"):
    requests.post(f"{url}/api/chat", json=body)
with tape("without_compression.yaml", decode_compressed_response=True):
    requests.post(f"{url}/api/chat", json=body)
with tape("file.yaml"):
    requests.post(f"{url}/api/chat", data=io.BytesIO(json.dumps(body).encode()))
with tape("iterator.yaml"):
    requests.post(f"{url}/api/chat", data=iter([b"one ", b"two"]))
with tape("serialised.json", serializer="json"):
    httpx.post(f"{url}/api/chat", json=body)
with tape("text.yaml"):
    httpx.post(f"{url}/api/chat", content="a: [b\\nc\\u2028d" + "long words " * 50)
with tape("bytes.yaml"):
    httpx.post(f"{url}/api/chat", content=b"\\xff\\x00")
with tape("missing.yaml"):
    httpx.get(f"{url}/nowhere")
with tape("several.yaml"):
    for n in range(5):
        httpx.post(f"{url}/api/chat", json={"n": n})
'''
BODY: Final = {"model": "m", "n": [1, 2.5, None, True], "text": "grüß"}
ANSWER: Final = '{"text":"grüß 🌱"}\n'
SENT: Final[dict[str, Any]] = {
    "binary_header.yaml": BODY,
    "object.yaml": BODY,
    "list.yaml": [BODY],
    "decoded.yaml": BODY,
    "compressed.yaml": BODY,
    "without_compression.yaml": BODY,
    "file.yaml": BODY,
    "iterator.yaml": b"one two",
    "serialised.json": BODY,
    "text.yaml": ("a: [b\nc\u2028d" + "long words " * 50).encode(),
    "bytes.yaml": b"\xff\x00",
}


def write(folder: Path, run: Callable[[dict[str, str]], object]) -> None:
    """Fill a folder with files of vcrpy. `run` executes the program with names and values."""
    zipped = Answer([gzip.compress(ANSWER.encode())], headers={"content-encoding": "gzip"})
    plain = Answer([ANSWER.encode()])
    answers = [plain, plain, plain, zipped, zipped, zipped, *[plain] * 5, *(Answer([{"n": n}]) for n in range(5))]
    with FakeOllama() as fake:
        fake.script("/api/chat", *answers)
        run({"url": fake.url, "folder": str(folder)})


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of the installed vcrpy."""
    folder = tmp_path_factory.mktemp("theirs")
    write(folder, lambda names: exec(WRITE, dict(names)))
    return folder


def check_all(folder: Path) -> None:
    """Play every file with the request that was recorded."""
    for name, body in SENT.items():
        cassette = Cassette(folder / name)
        (interaction,) = cassette.interactions
        url = interaction.request.uri
        assert (name, *exchange("sync", cassette, url, body=body)) == (name, 200, [ANSWER.encode()])
        assert cassette.unplayed == ()
    several = Cassette(folder / "several.yaml")
    for n in (4, 0, 1, 3, 2):
        assert exchange("sync", several, f"{ELSEWHERE}/api/chat", body={"n": n}) == (200, [b'{"n":%d}\n' % n])
    assert exchange("sync", Cassette(folder / "missing.yaml"), f"{ELSEWHERE}/nowhere", "GET")[0] == 404


class TestTheirFiles:
    def test_play_whatever_was_sent(self, theirs: Path) -> None:
        check_all(theirs)
        text = "".join(each.read_text(encoding="utf-8") for each in theirs.iterdir())
        for sign in ("!!binary", "BytesIO", "builtins.iter", "    body:\n      model: m\n", "!!python/tuple"):
            assert sign in text, "the files must hold what this is about"

    @modes
    def test_play_without_compression(self, theirs: Path, mode: str) -> None:
        for name in ("decoded.yaml", "compressed.yaml"):
            cassette = Cassette(theirs / name)
            assert "ncoding" in (theirs / name).read_text(encoding="utf-8")
            (interaction,) = cassette.interactions
            assert "content-encoding" not in {each.lower() for each in interaction.headers}
            assert interaction.body == ANSWER.encode()
            assert exchange(mode, cassette, f"{ELSEWHERE}/api/chat", body=BODY)[1] == [ANSWER.encode()]

    def test_need_no_version(self, theirs: Path, tmp_path: Path) -> None:
        path = tmp_path / "a.yaml"
        path.write_text((theirs / "several.yaml").read_text().replace("version: 1\n", ""))
        assert len(Cassette(path)) == 5
        path.write_text((theirs / "several.yaml").read_text().replace("version: 1\n", "version: 2\n"))
        with pytest.raises(CassetteError, match="`version` is not 1"):
            Cassette(path)

    @pytest.mark.parametrize("body", ["base64_string: YQ==", "{}"])
    def test_response_without_string_is_an_error(self, theirs: Path, tmp_path: Path, body: str) -> None:
        path = tmp_path / "a.yaml"
        text = (theirs / "missing.yaml").read_text()
        head, _, rest = text.partition("  response:\n    body:\n")
        path.write_text(f"{head}  response:\n    body:\n      {body}\n    headers:{rest.partition('    headers:')[2]}")
        with pytest.raises(CassetteError, match=r"has no `string`"):
            exchange("sync", Cassette(path), f"{ELSEWHERE}/nowhere", "GET")

    @pytest.mark.parametrize("name", ["several.yaml", "serialised.json"])
    def test_grow_without_a_change(self, theirs: Path, tmp_path: Path, fake: FakeOllama, name: str) -> None:
        path = tmp_path / name
        before = (theirs / name).read_text(encoding="utf-8")
        path.write_text(before, encoding="utf-8")
        count = len(Cassette(path))
        with Cassette(path, mode="new_episodes") as cassette:
            exchange("sync", cassette, f"{fake.url}/api/version", "GET")
        after = path.read_text(encoding="utf-8")
        if name.endswith("yaml"):
            assert after.startswith(before.removesuffix("version: 1\n"))
            assert after.endswith("version: 1\n")
        else:
            assert json.loads(after)["interactions"][:count] == json.loads(before)["interactions"]
        again = vcr.cassette.Cassette.load(
            path=str(path), serializer=jsonserializer if path.suffix == ".json" else yamlserializer
        )
        assert len(Cassette(path)) == len(again) == count + 1

    def test_share_parts_by_anchors(self, theirs: Path, tmp_path: Path) -> None:
        path = tmp_path / "a.yaml"
        text = (theirs / "several.yaml").read_text()
        first, begin, rest = text.partition("- request:\n    body: '{\"n\":1}'\n")
        assert rest
        path.write_text(
            first.replace("message: OK", "message: &ok OK") + begin + rest.replace("message: OK", "message: *ok")
        )
        cassette = Cassette(path)
        assert exchange("sync", cassette, f"{ELSEWHERE}/api/chat", body={"n": 4}) == (200, [b'{"n":4}\n'])
        assert [each.reason for each in cassette.interactions] == ["OK"] * 5

    @pytest.mark.parametrize("damage", ["status: {code: [", "\x00"])
    def test_damaged_interaction_is_named(self, theirs: Path, tmp_path: Path, damage: str) -> None:
        path = tmp_path / "a.yaml"
        head, _, rest = (theirs / "several.yaml").read_text().rpartition("    status:\n")
        path.write_text(head + damage + rest)
        with pytest.raises(CassetteError, match="not valid YAML"):
            _ = Cassette(path).interactions


@pytest.mark.slow
def test_oldest_versions_read_and_write(tmp_path: Path) -> None:
    old = tmp_path / "old"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(old), *OLDEST],
        check=True,
        capture_output=True,
    )
    path = {"PYTHONPATH": os.pathsep.join([str(old), *sys.path])}
    folder = tmp_path / "theirs"
    folder.mkdir()

    def run(names: dict[str, str]) -> None:
        given = "".join(f"{name} = {value!r}\n" for name, value in names.items())
        found = subprocess.run(
            [sys.executable, "-c", f"{given}{WRITE}\nprint(vcr.__version__)"],
            env={**os.environ, **path},
            capture_output=True,
            encoding="utf-8",
            check=False,
        )
        assert found.stdout.strip() == OLDEST[0].partition("==")[2], found.stderr

    write(folder, run)
    check_all(folder)
    ours = [tmp_path / "story.yaml", *sorted((ROOT / "cassettes").rglob("*.yaml"))]
    with FakeOllama() as fake:
        _, pieces = recorded(ours[0], fake, STREAM, body={"model": "m"})
        url = fake.url
    (tmp_path / "test_it.py").write_text(
        f"""
import httpx, pytest

@pytest.mark.vcr(*{[str(each) for each in ours]!r})
def test_all(vcr):
    assert len(vcr) == {sum(len(Cassette(each)) for each in ours)}
    assert httpx.post({url!r} + "/api/chat", json={{"model": "m"}}).content == {b"".join(pieces)!r}
"""
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "pytest_recording.plugin", "-c"]
    found = subprocess.run(
        [*command, os.devnull, "--rootdir", str(tmp_path), str(tmp_path / "test_it.py")],
        env={**os.environ, **path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )
    assert found.returncode == 0, found.stdout


class TestOurFiles:
    def test_plays_our_files(self, tmp_path: Path, fake: FakeOllama) -> None:
        path = tmp_path / "a.yaml"
        _, pieces = recorded(path, fake, STREAM, body={"model": "m"})
        player = vcr.VCR(record_mode=vcr.mode.NONE, match_on=["method", "path", "body"])
        with player.use_cassette(str(path)) as cassette, httpx.Client() as client:
            response = client.post(f"{ELSEWHERE}/api/chat", json={"model": "m"})
        assert response.content == b"".join(pieces)
        assert cassette.all_played

    @pytest.mark.parametrize("by", ["vcrpy", pytest.param("pytest-recording", marks=pytest.mark.slow)])
    def test_keeps_our_keys(self, outer: pytest.Pytester, fake: FakeOllama, by: str) -> None:
        path = outer.path / "cassettes" / "test_it" / "test_more.yaml"
        live = recorded(path, fake, STREAM)
        if by == "vcrpy":
            with vcr.use_cassette(str(path), record_mode=vcr.mode.NEW_EPISODES), httpx.Client() as client:
                client.get(f"{fake.url}/api/version")
        else:
            outer.makepyfile(
                test_it=f"""
            import httpx, pytest

            @pytest.mark.vcr
            def test_more():
                assert httpx.get("{fake.url}/api/version").is_success
            """
            )
            result = outer.runpytest_subprocess("-p", "pytest_recording.plugin", "--record-mode=new_episodes")
            result.assert_outcomes(passed=1)
        cassette = Cassette(path)
        assert (len(cassette), cassette.server) == (2, "Ollama 0.9.3")
        assert exchange("async", cassette, f"{ELSEWHERE}/api/chat") == live
        assert exchange("sync", cassette, f"{ELSEWHERE}/api/version", "GET") == (200, [b'{"version":"0.9.3"}'])

    @pytest.mark.slow
    def test_reads_every_cassette_of_the_repository(self, outer: pytest.Pytester) -> None:
        paths = sorted((ROOT / "cassettes").rglob("*.yaml"))
        lengths = {str(path): len(Cassette(path)) for path in paths}
        assert {path: len(vcr.cassette.Cassette.load(path=path)) for path in lengths} == lengths
        # pytest-recording joins several cassettes into one.
        outer.makepyfile(
            test_it=f"""
        import pytest

        @pytest.mark.vcr(*{list(lengths)})
        def test_all(vcr):
            assert len(vcr) == {sum(lengths.values())}
        """
        )
        outer.runpytest_subprocess("-p", "pytest_recording.plugin").assert_outcomes(passed=1)
