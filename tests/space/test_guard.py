"""Requests that no browser makes, sent to the real page with gradio behind it."""

import asyncio
import gc
import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests

from llama_space import gradio_bounds, guard
from tests.rigs import http_served, space
from tests.rigs.http_served import Answer, Request
from tests.rigs.space import Space
from tests.rigs.waiting import comes

PRESS = 4
"""The function behind the button that translates, in the order in which the page adds them."""


@pytest.fixture(scope="module")
def hub() -> Iterator[tuple[str, list[str | None]]]:
    """A Hub, and the credentials that came to it."""
    asked: list[str | None] = []

    def answer(request: Request) -> Answer:
        asked.append(request.headers["Authorization"])
        return Answer(200, [])

    with http_served.serving(answer) as url:
        yield url, asked


@pytest.fixture(scope="module")
def page(
    hub: tuple[str, list[str | None]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Space]:
    """Serve the real page; its engine fails at once, because there is no release."""
    home = tmp_path_factory.mktemp("guard")
    missing = (home / "manifest.json").as_uri()
    secrets = {"HF_TOKEN": "hf_owners", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_ENDPOINT": hub[0]}
    options = {"llama_cpp_manifest_url": missing, "max_chars": "1000", "offline": "1"}
    with space.serving(home, **options, **secrets) as up:
        assert comes(lambda: "/gradio_api/mcp/" in up.said())  # its last line
        yield up


def test_no_visitor_asks_the_hub_with_the_token_of_the_machine(
    page: Space, hub: tuple[str, list[str | None]]
) -> None:
    """Gradio takes the token that is saved on it for callers on loopback: its run history."""
    assert config(page).json()["run_history"] is False
    for route in ("run-history/buckets", "run-history/records?bucket=owner/runs", "runs"):
        assert requests.get(f"{page.url}/gradio_api/{route}", timeout=30).status_code == 404
    assert post(page, "run-history/connect", json={"bucket_id": "owner/runs"}).status_code == 404
    named = {"X-Gradio-History-Bucket": "owner/runs"}
    event = post(page, "call/detect", json={"data": ["Hello."]}, headers=named).json()
    address = f"{page.url}/gradio_api/call/detect/{event['event_id']}"
    assert "complete" in requests.get(address, timeout=30).text
    assert not [token for token in hub[1] if token]


def post(page: Space, route: str, **options: Any) -> requests.Response:
    return requests.post(f"{page.url}/gradio_api/{route}", timeout=30, **options)


def config(page: Space, **headers: str) -> requests.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return requests.get(f"{page.url}/config", headers=named, timeout=30)


async def well(scope: Any, receive: Any, send: Any) -> None:
    del scope, receive
    await send({"type": "http.response.start", "status": 200, "headers": []})


async def answered(scope: dict[str, Any], receive: Any, application: Any = well) -> int:
    """Return the status that the guard alone gives, before an application that says 200."""
    sent: list[int] = []

    async def send(message: Any) -> None:
        sent.append(message.get("status", 0))

    usual = {"type": "http", "method": "GET", "path": "/config", "headers": []}
    await guard.Guard(application, max_chars=1)({**usual, **scope}, receive, send)
    return sent[0]


async def empty() -> dict[str, Any]:
    return {"type": "http.request"}


def test_icon_of_the_page_has_two_sizes() -> None:
    """Gradio makes one of any size from an app's own icon: one of 10,000 takes 800 MB."""
    for size, status in ((192, 200), (512, 200), (10_000, 404)):
        assert asyncio.run(answered({"path": f"/pwa_icon/{size}"}, empty)) == status


def test_programs_see_two_endpoints_and_the_languages_in_the_description(page: Space) -> None:
    """Handlers of the page have names too; one of the same name would take it away."""
    told = requests.get(f"{page.url}/gradio_api/info", timeout=30).json()
    named = told["named_endpoints"]
    assert not told["unnamed_endpoints"]
    assert list(named) == ["/translate", "/detect"]
    assert "zh-Hant (Chinese (Traditional))" in named["/translate"]["description"]
    parameters = [one["parameter_name"] for one in named["/translate"]["parameters"]]
    assert parameters == ["text", "target_language", "source_language"]
    assert named["/translate"]["returns"][0]["type"] == {"type": "string"}


def test_page_uploads_nothing_of_a_visitor(page: Space) -> None:
    for route in ("upload", "process_recording", "stream/x"):
        answer = post(page, route, files={"files": ("visitors.bin", b"x" * 3_000_000)})
        assert answer.status_code == 404


@pytest.fixture
def stranger() -> Iterator[tuple[str, list[str]]]:
    """An address of another server, and the requests that it got."""
    asked: list[str] = []

    def answer(request: Request) -> Answer:
        asked.append(request.path)
        return Answer(200, b"<script>alert(document.domain)</script>")

    with http_served.serving(answer) as url:
        yield url, asked


@pytest.mark.parametrize(
    "route",
    [
        *("file={}/x.png", "%66ile={}/x.png", "file/{}/x.png", "proxy={}/x.png"),
        *("file=/etc/passwd", "upload_progress?upload_id=x", "stream/s/1/2/playlist-file", "token"),
        "custom_component/x%0A%1B%5B2Jllama_space%3A%20ready%0A/client/t/f",
        *(
            "deep_link",
            "vibe-code",
            "%0A",
            *("mcp/x", "mcp/sse", "mcp/messages/?session_id=x"),
            "call/detect/a/b",
            "heartbeat/a%0Ab",
            "mcp/../file={}/x",
        ),
    ],
)
def test_route_that_the_page_never_asks_for_is_closed(
    page: Space, stranger: tuple[str, list[str]], route: str
) -> None:
    url, asked = stranger
    before = page.said()
    address = f"{page.url}/gradio_api/{route.format(url)}"
    prepared = requests.Request("GET", address).prepare()
    prepared.url = address  # as it stands: no part of it is taken out or quoted
    with requests.Session() as session:
        for method in ("GET", "HEAD", "DELETE"):
            prepared.method = method
            assert session.send(prepared, timeout=30).status_code == 404
    assert asked == []
    assert page.said() == before


@pytest.mark.parametrize("route", ["call/detect", "call/v2/detect", "queue/join", "mcp/"])
@pytest.mark.parametrize("wrapped", ["{}", "[{}]", '{{"text": {}}}'])
def test_argument_that_stands_for_a_file_is_not_fetched(
    page: Space, stranger: tuple[str, list[str]], route: str, wrapped: str
) -> None:
    """Gradio downloads it to the temporary files, through a link that another user put there."""
    url, asked = stranger
    file = json.dumps({"path": f"{url}/f", "meta": {"_type": "gradio.FileData"}})
    value = json.loads(wrapped.format(file))
    dependencies = config(page).json()["dependencies"]
    (detect,) = (one["id"] for one in dependencies if one["api_name"] == "detect")
    called = {"name": "detect", "arguments": {"text": value}}
    bodies: dict[str, object] = {
        "call/detect": {"data": [value]},
        "call/v2/detect": {"text": value},
        "queue/join": {"data": [value], "fn_index": detect, "session_hash": "file"},
        "mcp/": {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": called},
    }
    headers = {"Accept": "application/json, text/event-stream"}
    assert post(page, route, json=bodies[route], headers=headers).status_code == 400
    assert asked == []
    assert "Traceback" not in page.said()


@pytest.mark.parametrize("wrapped", ["{}", '{{"value": {}, "index": 0}}', '[{{"value": [{}]}}]'])
@pytest.mark.parametrize("route", ["queue/join", "run/predict"])
def test_what_an_event_says_of_itself_stands_for_no_file(
    page: Space, stranger: tuple[str, list[str]], route: str, wrapped: str
) -> None:
    """A chat puts the option that was chosen among its messages, and gradio downloads it."""
    url, asked = stranger
    about = json.loads(wrapped.format(json.dumps({"file": {"path": f"{url}/f"}})))
    body = {"data": VALUES, "fn_index": PRESS, "session_hash": "option", "event_data": about}
    answer = post(page, route, json=body)
    assert answer.status_code == 400
    assert "none that the page makes" in answer.json()["detail"]
    assert asked == []


def test_session_that_fetches_no_answers_sends_no_more_events(page: Space) -> None:
    """Gradio kept 4 to 30 kB of each, of any number of them."""
    body = {"data": VALUES, "fn_index": PRESS, "session_hash": "unread"}
    told = [post(page, "queue/join", json=body).status_code for _ in range(21)]
    assert told == [200] * 20 + [429]
    assert post(page, "queue/join", json={**body, "session_hash": "read"}).status_code == 200
    address = f"{page.url}/gradio_api/queue/data?session_hash=unread"
    assert requests.get(address, timeout=60).text.count("process_completed") == 20
    assert post(page, "queue/join", json=body).status_code == 200


def test_answers_that_no_client_fetches_are_forgotten_the_oldest_first(page: Space) -> None:
    """Gradio kept those of 2,000 sessions, and one more for each cancellation of an event."""

    def send() -> str:
        while (told := post(page, "call/detect", json={"data": ["Hello."]})).status_code == 503:
            time.sleep(0.05)  # its queue has 20 places
        return str(told.json()["event_id"])

    def read(event: str) -> str:
        return requests.get(f"{page.url}/gradio_api/call/detect/{event}", timeout=30).text

    events = [send() for _ in range(gradio_bounds._UNREAD_BY_ALL + 30)]
    assert "complete" not in read(events[0])
    assert "complete" in read(events[-1])
    ended = {"session_hash": events[-2], "fn_index": 0, "event_id": events[-2]}
    assert post(page, "cancel", json=ended).status_code == 404


def test_event_of_a_chat_tells_what_was_chosen(page: Space) -> None:
    about = {"index": [0, 1], "value": [{"type": "text", "text": "x"}], "liked": True}
    body = {"data": VALUES, "fn_index": PRESS, "session_hash": "chosen", "event_data": about}
    assert post(page, "queue/join", json=body).status_code == 200


def test_browser_fetches_no_image_of_elsewhere(page: Space) -> None:
    """A model's answer with one would send the chat to a stranger, as a part of its address."""
    for told in (config(page), requests.get(page.url, timeout=30)):
        policy = told.headers["Content-Security-Policy"]
        assert policy == "img-src 'self' data: blob:; media-src 'self' data: blob:"


def test_mcp_clients_write_nothing_into_the_log(page: Space) -> None:
    called = {"name": "x\n\x1b[2Jllama_space: forged\n", "arguments": {}}
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": called}
    headers = {"Accept": "application/json, text/event-stream"}
    for _ in range(3):  # the log of the first is there when the last is answered
        for asked in (body, {**body, "method": "forged\n"}, {**body, "params": {}}):
            assert post(page, "mcp/", json=asked, headers=headers).status_code == 200
    assert not re.findall("forged|validat", page.said())


@pytest.mark.parametrize("route", ["info", "openapi.json"])
def test_address_of_one_visitor_is_not_told_to_the_next(page: Space, route: str) -> None:
    for host in ("192.0.2.7", "192.0.2.8"):
        headers = {"Host": host}
        told = requests.get(f"{page.url}/gradio_api/info", headers=headers, timeout=30).text
        assert host in told
        other = requests.get(f"{page.url}/gradio_api/{route}", timeout=30).text
        assert host not in other

    def told_to(number: int) -> bool:
        headers = {"Host": f"192.0.2.{number}"}
        told = requests.get(f"{page.url}/gradio_api/info", headers=headers, timeout=30).text
        return set(re.findall(r"192\.0\.2\.[0-9]+", told)) == {f"192.0.2.{number}"}

    with ThreadPoolExecutor(16) as visitors:
        assert all(visitors.map(told_to, range(1, 100)))


def test_body_larger_than_a_text_can_be_is_refused_before_it_is_kept(page: Space) -> None:
    text = "x" * 1_000_000
    asked = {"data": [text], "fn_index": 0, "session_hash": "s"}
    answer = post(page, "queue/join", json=asked)
    assert answer.status_code == 413
    without_length = post(page, "queue/join", data=iter([json.dumps(asked).encode()]))
    assert without_length.status_code == 413
    address = f"{page.url}/gradio_api/heartbeat/s"
    assert requests.get(address, data="[]", timeout=30).status_code == 413


def test_body_is_not_kept_while_the_request_is_answered() -> None:
    def kept() -> int:
        return sum("so much" in one for one in gc.get_objects() if type(one) is dict)

    async def application(scope: Any, receive: Any, send: Any) -> None:
        del scope
        status = 200 + kept()
        assert await receive() == {"type": "http.request", "body": body, "more_body": False}
        await send({"type": "http.response.start", "status": status, "headers": []})

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body}

    body = b'[{"so much": 1}]'
    scope = {"method": "POST", "path": "/gradio_api/mcp/"}
    assert asyncio.run(answered(scope, receive, application)) == 200


def test_longest_text_of_the_page_passes_in_any_script(page: Space) -> None:
    asked = {
        "data": ["\U00020000" * 1000, "auto", "ja", ""],
        "fn_index": PRESS,
        "session_hash": "s",
    }
    answer = post(page, "queue/join", json=asked)
    assert answer.status_code == 200


@pytest.mark.parametrize("route", ["queue/join", "cancel", "call/detect"])
@pytest.mark.parametrize("name", ["session_hash", "event_id", "event_data", "oauth_token"])
def test_names_that_gradio_keeps_have_a_length(page: Space, route: str, name: str) -> None:
    """It kept those of each request, 290,000 characters long, for hours."""
    usual = {"data": ["x"], "fn_index": 0, "session_hash": "s", "event_id": "e"}
    for long in ("x" * 6097, ["x" * 6097], {"x": "x" * 6097}):
        answer = post(page, route, json={**usual, name: long})
        assert answer.status_code == 400
        assert answer.json()["detail"].startswith(f"{name} has at most")


VALUES = ["x", "auto", "en", ""]
CALLS: dict[str, list[object]] = {
    "queue/join": [
        {"data": [], "fn_index": 999, "session_hash": "s"},
        {"data": [], "fn_index": -1, "session_hash": "s"},
        {"data": [], "fn_index": "a", "session_hash": "s"},
        {"data": [1, {}, [], ""], "fn_index": PRESS, "session_hash": "s"},
        {"data": ["x", "klingon", "en", ""], "fn_index": PRESS, "session_hash": "s"},
        {"data": ["x"], "fn_index": PRESS, "session_hash": "s"},
        [1],
    ],
    "run/predict": [{"data": VALUES, "fn_index": PRESS}, {"data": [], "fn_index": 0}],
    "run/translate": [{"data": []}],
    "run/no_such_function": [{"data": []}],
    "call/translate": [{"data": [1, 2, 3, 4, 5, 6]}],
    "call/v2/no_such_function": [{"text": 1}],
    "component_server": [{"component_id": 99999, "fn_name": "x", "data": ""}],
    "mcp/": [{"x": 1}],
}


@pytest.mark.parametrize(
    "values", [["Hello.", "auto", "en", ""], ["a.txt", "SGVsbG8u", "auto", "en"]]
)
def test_null_in_place_of_an_input_writes_no_traceback(page: Space, values: list[str]) -> None:
    told = config(page).json()
    kinds = {one["id"]: one["type"] for one in told["components"]}
    asking = [one for one in told["dependencies"] if one["backend_fn"] and len(one["inputs"]) == 4]
    assert len(asking) == 2
    dropdowns = [number for number, value in enumerate(values) if value in {"auto", "en"}]
    (function,) = (
        one["id"]
        for one in asking
        if [kinds[name] == "dropdown" for name in one["inputs"]]
        == [number in dropdowns for number in range(4)]
    )
    for place in range(4):
        data = [None if number == place else value for number, value in enumerate(values)]
        session = f"{function}-{place}"
        asked = {"data": data, "fn_index": function, "session_hash": session}
        answer = post(page, "queue/join", json=asked)
        assert answer.status_code == (400 if place in dropdowns else 200)
        if answer.ok:
            await_end(page, session)
    assert "Traceback" not in page.said()


def await_end(page: Space, session: str) -> None:
    address = f"{page.url}/gradio_api/queue/data?session_hash={session}"
    with requests.get(address, stream=True, timeout=30) as told:
        assert any(b"process_completed" in line for line in told.iter_lines())


@pytest.mark.parametrize("levels", [33, 300, 900, 5000])
@pytest.mark.parametrize(
    "route", ["queue/join", "call/translate", "call/v2/detect", "mcp/", "cancel", "reset"]
)
def test_deeply_nested_body_is_refused_without_a_traceback(
    page: Space, route: str, levels: int
) -> None:
    headers = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
    nested = ("[" * levels + "]" * levels, '{"data":' * levels + "1" + "}" * levels)
    for one in (*nested, "[{", '{"data": ["\\ud800", "en", "auto"], "text": "\\ud800"}'):
        assert post(page, route, data=one, headers=headers).status_code == 400
    assert "Traceback" not in page.said()


@pytest.mark.parametrize("route", CALLS)
def test_call_that_no_browser_makes_writes_no_traceback(page: Space, route: str) -> None:
    line = f"refused POST /gradio_api/{route}"
    before = page.said().count(line)
    for asked in CALLS[route]:
        assert post(page, route, json=asked).status_code < 500
    assert "Traceback" not in page.said()
    assert page.said().count(line) - before <= len(CALLS[route])


@pytest.mark.parametrize(
    ("route", "asked", "sentence"),
    [
        ("call/translate", {"data": ["x", "en"]}, "text, target_language, source_language"),
        ("call/translate", {"data": ["x", "en"]}, "2 came"),
        ("call/translate", {"text": "x"}, "none came"),
        ("call/translate", ["x"], "none came"),
        ("call/detect", {"data": []}, "detect takes 1 values: text"),
        ("call/v2/translate", {"text": "x", "to": "en"}, "unknown: to"),
        ("call/v2/translate", ["x"], "text, target_language, source_language"),
        ("call/translat", {"data": ["x", "en", "auto"]}, "there are: translate, detect"),
    ],
)
def test_programs_wrong_call_is_answered_with_what_is_right(
    page: Space, route: str, asked: object, sentence: str
) -> None:
    answer = post(page, route, json=asked)
    assert 400 <= answer.status_code < 500
    assert sentence in answer.json()["detail"]
    assert "Traceback" not in page.said()


@pytest.mark.parametrize("route", ["call/translate/nobody", "queue/data?session_hash=nobody"])
def test_stream_that_does_not_exist_writes_no_traceback(page: Space, route: str) -> None:
    before = page.said()
    told = requests.get(f"{page.url}/gradio_api/{route}", timeout=10)
    assert "event: error" in told.text or "session_not_found" in told.text
    await_line(page, before)
    (line,) = page.said().removeprefix(before).splitlines()
    assert line.startswith("refused GET /gradio_api/")


def await_line(page: Space, before: str) -> None:
    """Await what is written after ``before``, and what may follow it."""
    while page.said() == before:
        time.sleep(0.01)
    time.sleep(0.2)


@pytest.mark.parametrize("header", ["Host", "X_Forwarded_Host"])
@pytest.mark.parametrize(
    "host", ["evil.example", 'a"><script>alert(1)</script>', "evil.example:80"]
)
def test_host_of_another_page_is_not_reflected(page: Space, header: str, host: str) -> None:
    """A name that an attacker's DNS leads to this machine would make the page the attacker's."""
    answer = config(page, **{header: host})
    assert answer.status_code == 421
    assert host not in answer.text


def test_page_answers_to_the_names_of_its_machine(page: Space) -> None:
    port = page.url.rpartition(":")[2]
    for own in ("localhost", "127.0.0.1", "[::1]"):
        assert config(page, Host=f"{own}:{port}").status_code == 200
        assert config(page, Host=own, Origin=f"http://{own}").status_code == 200
    answer = config(page, X_Gradio_Server="http://evil.example")
    assert answer.status_code == 200
    assert "evil.example" not in answer.text


@pytest.mark.parametrize("origin", ["https://evil.example", "http://192.0.2.7:81", "null"])
def test_page_of_another_origin_reads_no_answer(page: Space, origin: str) -> None:
    """Gradio allows each origin, with its cookies, where the host is not localhost."""
    for host in ("192.0.2.7", "localhost"):
        for one in ({}, {"X_Forwarded_Host": "192.0.2.7:81"}):  # a page may send this one
            assert config(page, Host=host, Origin=origin, **one).status_code == 403


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("SPACE_ID", "owner/name"),  # the Hub's proxy chooses the Space by the Host
        ("GRADIO_ROOT_PATH", "https://www.example.org/translate"),
    ],
)
def test_host_of_a_proxy_in_front_of_the_page_is_its_own(
    name: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = (b"origin", b"https://www.example.org")
    scope = {"headers": [(b"host", b"www.example.org"), origin]}
    assert asyncio.run(answered(scope, empty)) == 421
    monkeypatch.setenv(name, text)
    assert asyncio.run(answered(scope, empty)) == 200
    assert asyncio.run(answered({"headers": [(b"host", b"127.0.0.1"), origin]}, empty)) == 200


def test_body_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def drip() -> dict[str, Any]:
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b"", "more_body": True}

    monkeypatch.setattr(guard, "_SECONDS", 0.1)
    scope = {"method": "POST", "path": "/gradio_api/queue/join"}
    assert asyncio.run(answered(scope, drip)) == 408


def test_more_requests_than_there_are_descriptors_for_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(guard, "_OPEN", 2)

    async def counted() -> list[int]:
        waiting, told = asyncio.Event(), []

        async def application(scope: Any, receive: Any, send: Any) -> None:
            del scope, receive
            await waiting.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})

        async def receive() -> dict[str, Any]:
            return {"type": "http.request"}

        async def send(message: Any) -> None:
            if "status" in message:
                told.append(message["status"])
                waiting.set()  # the first answer is the refusal: the two others wait for it

        guarded = guard.Guard(application, max_chars=1)
        scope = {"type": "http", "method": "GET", "path": "/config", "headers": []}
        await asyncio.gather(*(guarded({**scope}, receive, send) for _ in range(3)))
        await guarded({**scope}, receive, send)
        return told

    assert asyncio.run(counted()) == [503, 200, 200, 200]
