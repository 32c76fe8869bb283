"""What a command waits for: downloads, and the choice of a provider."""

from __future__ import annotations

import re
import socket
from typing import TYPE_CHECKING

import pytest

from graftage_ollama.testing import FakeOllama

if TYPE_CHECKING:
    from cli.conftest import Shell

FIRST = """
class Connection:
    address = "here"

    @hookimpl
    def chat(self, request):
        size = 98_000_000
        steps = [
            PullProgress(status="Small by Somebody, licence Apache-2.0 \\x1b[2J", digest="sha256:ab", total=size),
            PullProgress(status="downloading small 1.0", total=size, completed=0),
            PullProgress(status="downloading small 1.0", total=size, completed=size // 2),
            PullProgress(status="downloading small 1.0", total=size, completed=size),
            PullProgress(status="success"),
        ]
        for step in steps:
            request.call.emit("progress", progress=step)
        yield Chunk(text="Here I am.")
        yield Chunk(finish_reason="stop")

    @hookimpl
    def health(self, request):
        return Health(level=request.level, reachable=True)

class Provider:
    @hookimpl
    def connect(self, request):
        return Connection()

it = Provider()
"""


ENDLESS = FIRST.replace(
    "steps = [", "steps = [PullProgress(status=f'part {n} of many', total=9, completed=1) for n in range(60)] + ["
)


class TestDownload:
    """A provider that downloads its model by itself."""

    @pytest.mark.parametrize("how", [(), ("--no-stream",)])
    def test_is_printed_with_the_licence(self, shell: Shell, how: tuple[str, ...]) -> None:
        shell.install(FIRST)
        progress = "Small by Somebody, licence Apache-2.0 \\x1b[2J\ndownloading small 1.0\n"
        assert shell.run("chat", "Hi", *how) == (0, "Here I am.\n", progress)

    def test_keeps_json_clean(self, shell: Shell) -> None:
        shell.install(FIRST)
        done = shell.run("chat", "Hi", "--json")
        assert done.out.startswith("{\n")
        assert "licence Apache-2.0" in done.err

    def test_is_a_bar_in_a_terminal(self, shell: Shell) -> None:
        shell.install(FIRST)
        child = shell.terminal("chat", columns=70)
        child.expect(">>> ")
        child.sendline("Hi")
        child.expect_exact(r"Small by Somebody, licence Apache-2.0 \x1b[2J")
        child.expect("downloading small 1.0 .*98.0/98.0 MB")
        child.expect(r"Here I am\.")
        child.expect(">>> ")
        child.sendeof()
        assert shell.ends(child) == 0

    def test_many_parts_fit_the_terminal(self, shell: Shell) -> None:
        shell.install(ENDLESS)
        child = shell.terminal("chat", columns=70)
        child.expect(">>> ")
        child.sendline("Hi")
        child.expect("part 59 of many")
        child.expect(r"Here I am\.")
        erased = re.findall(r"(?:\x1b\[1A\x1b\[2K)+", child.before)
        assert max(run.count("\x1b[1A") for run in erased) <= 20
        child.sendline("/exit")
        assert shell.ends(child) == 0


READING = """
import time

class Connection:
    @hookimpl
    def chat(self, request):
        for read in range(45, 101, 5) if "slowly" in request.messages[-1].content else (0, 100):
            time.sleep(0.15 if read else 0)
            request.call.emit("prompt_progress", prompt=PromptProgress(total=200, processed=2 * read, cached=4))
        yield Chunk(text="Read.", finish_reason="stop")

class Provider:
    @hookimpl
    def connect(self, request):
        return Connection()

it = Provider()
"""


class TestPromptReading:
    def test_is_shown_if_it_takes_long(self, shell: Shell) -> None:
        shell.install(READING)
        child = shell.terminal("chat", columns=70)
        child.expect(">>> ")
        child.sendline("Hi")
        child.expect(r"Read\.")
        assert "reading the prompt" not in child.before
        child.expect(">>> ")
        child.sendline("slowly")
        child.expect("reading the prompt: [5-9][05] %")
        child.expect(r"Read\.")
        child.expect(">>> ")
        child.sendeof()
        assert shell.ends(child) == 0

    def test_goes_to_no_file(self, shell: Shell) -> None:
        shell.install(READING)
        assert shell.run("chat", "slowly") == (0, "Read.\n", "")


@pytest.fixture
def fake(shell: Shell) -> object:
    shell.environment["GRAFTAGE_PROVIDER"] = ""
    shell.environment["GRAFTAGE_MODEL"] = ""
    with FakeOllama() as server:
        shell.environment["OLLAMA_HOST"] = server.url
        yield server


TAKEN = "smollm2:135m on ollama, because no provider was named.\n"


class TestAuto:
    """The command names no provider."""

    @pytest.mark.parametrize(
        "command",
        [["chat", "Hi"], ["chat", "--json", "Hi"], ["generate", "Once"], ["chat", "-m", "smollm2:135m", "Hi"]],
    )
    def test_chosen_provider_is_shown(self, shell: Shell, fake: FakeOllama, command: list[str]) -> None:
        done = shell.run(*command)
        assert (done.code, done.err) == (0, TAKEN)

    @pytest.mark.parametrize("command", [["chat", "-m", "ollama:smollm2:135m", "Hi"], ["chat", "Hi"]])
    def test_named_provider_is_not_shown(self, shell: Shell, fake: FakeOllama, command: list[str]) -> None:
        named = {"GRAFTAGE_PROVIDER": "ollama", "GRAFTAGE_MODEL": "smollm2:135m"} if "-m" not in command else {}
        assert shell.run(*command, **named) == (0, "Hello from the fake.\n", "")

    def test_conversation_keeps_its_provider(self, shell: Shell) -> None:
        shell.environment |= {"GRAFTAGE_PROVIDER": "", "GRAFTAGE_MODEL": ""}
        with FakeOllama() as server:
            shell.environment["OLLAMA_HOST"] = server.url
            child = shell.terminal("chat", columns=120)
            child.expect("smollm2:135m on ollama")
            child.expect(">>> ")
            child.sendline("Hi")
            child.expect("Hello from the fake")
            child.expect(">>> ")
        child.sendline("And now?")
        child.expect("error: Nothing listens")
        child.expect(">>> ")
        child.sendeof()
        assert shell.ends(child) == 0

    def test_named_server_is_the_only_one_asked(self, shell: Shell, fake: FakeOllama) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        done = shell.run("chat", "-m", "smollm2:135m", "Hi", "--host", f"127.0.0.1:{port}")
        assert (done.code, done.out) == (1, "")
        assert done.err.startswith("error: Nothing listens at")

    def test_models_follow_the_chosen_provider(self, shell: Shell, fake: FakeOllama) -> None:
        assert "smollm2:135m" in shell.run("models", "list").out
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        done = shell.run("models", "list", OLLAMA_HOST=f"127.0.0.1:{port}")
        assert "smollm2:135m" not in done.out
        assert done.err.startswith(
            "Using llamacpp, because no provider was named. `ollama` cannot be taken: Nothing listens"
        )
