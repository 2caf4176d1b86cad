"""The Space for programs: gradio's own client, and the MCP SDK's, over what is served."""

import asyncio
import subprocess
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import documented
import pytest
import space
from gradio_client import Client
from mcp import ClientSession
from mcp.client.streamable_http import streamable_http_client
from mcp.types import CallToolResult, TextContent, Tool
from space import Space

pytestmark = [pytest.mark.docker, pytest.mark.model, pytest.mark.timeout(300)]

_Answer = TypeVar("_Answer")

TEXT = "猫が好きです。"


@pytest.fixture(scope="module")
def app(
    real_manifest: str, real_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Space]:
    variables = {
        **space.pinned(real_manifest),
        "max_chars": "300",
        "max_new_tokens": "16",
        "n_ctx": "512",
    }
    home = tmp_path_factory.mktemp("home")
    with space.serving(home, **variables, gguf_path=str(real_model)) as served:
        yield served


@pytest.fixture(scope="module")
def client(app: Space) -> Iterator[Client]:
    with closing(Client(app.url, verbose=False)) as connected:
        yield connected


def test_gradio_s_client_gets_the_text_piece_by_piece(client: Client) -> None:
    job = client.submit(TEXT, "en", api_name="/translate")
    whole = job.result(120)
    pieces = job.outputs()
    assert whole
    assert pieces[-1] == whole
    assert len(pieces) > 1
    # in the end the text gets its source's form: one line, whatever the small model wrote
    assert all(" ".join(whole.split()).startswith(" ".join(one.split())) for one in pieces)


def test_gradio_s_client_may_name_languages_or_leave_them_away(client: Client) -> None:
    named = client.predict(TEXT, "English", "Japanese", api_name="/translate")
    assert named == client.predict(TEXT, api_name="/translate")


def test_curl_lines_of_the_readme_stream_a_translation(app: Space) -> None:
    lines = [one.text for one in documented.commands("spaces/README.md") if "API" in one.text]
    assert len(lines) == 3
    script = "\n".join(lines).replace("https://OWNER-SPACE.hf.space", app.url)
    done = subprocess.run(["bash", "-ec", script], capture_output=True, text=True, check=True)
    assert "event: generating\ndata: [" in done.stdout
    assert "event: complete\ndata: [" in done.stdout


async def by_mcp(url: str, *calls: dict[str, Any]) -> tuple[list[Tool], list[CallToolResult]]:
    """Shake hands, list the tools, and call the one there is, in one session."""
    async with (
        streamable_http_client(f"{url}/gradio_api/mcp/") as (reading, writing, _),
        ClientSession(reading, writing) as session,
    ):
        await session.initialize()
        tools = (await session.list_tools()).tools
        results = [await session.call_tool(tools[0].name, call) for call in calls]
    return tools, results


def run(answer: Coroutine[Any, Any, _Answer]) -> _Answer:
    """Run it in a thread of its own: playwright's loop, of other tests, runs in this one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, answer).result()


def said(result: CallToolResult) -> str:
    return "".join(one.text for one in result.content if isinstance(one, TextContent))


def test_an_mcp_client_finds_two_tools_that_say_what_they_take(app: Space) -> None:
    tools, _ = run(by_mcp(app.url))
    tool, detecting = tools
    assert (tool.name, detecting.name) == ("translate", "detect")
    assert "Translate a text" in (tool.description or "")
    assert "de (German)" in (tool.description or "")
    assert "pt-BR" in (tool.description or "")
    assert "Guess which language" in (detecting.description or "")
    properties = tool.inputSchema["properties"]
    assert set(properties) == {"text", "target_language", "source_language"}
    assert "zh-Hans" in properties["target_language"]["description"]


def test_an_mcp_client_gets_the_same_translation_as_gradio_s(app: Space, client: Client) -> None:
    call = {"text": TEXT, "target_language": "en"}
    _, (result,) = run(by_mcp(app.url, call))
    assert not result.isError
    assert said(result).strip() == client.predict(TEXT, "en", api_name="/translate").strip()


def test_an_mcp_client_is_told_what_is_wrong_and_may_go_on(app: Space) -> None:
    wrong = {"text": TEXT, "target_language": "Klingon"}
    right = {"text": TEXT, "target_language": "en"}
    _, (refused, answered) = run(by_mcp(app.url, wrong, right))
    assert refused.isError
    assert "LANGUAGE_UNKNOWN" in said(refused)
    assert not answered.isError
    assert "Traceback" not in app.said()
