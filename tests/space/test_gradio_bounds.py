"""Bounds of what gradio keeps and runs: sessions, events, threads, its folder of files."""

import asyncio
import importlib
import os
import sys
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import gradio
import pytest
from gradio.server_messages import ProcessCompletedMessage

from llama_space import gradio_bounds
from tests.rigs import space
from tests.rigs.heard import heard


def test_call_that_is_over_is_neither_lost_nor_cancelled() -> None:
    """A caller that hangs up then costs others their client; a page gets its answer twice."""
    server, future = SimpleNamespace(_client_instance="everybody's"), Future[str]()
    future.set_running_or_notify_cancel()

    async def hang_up() -> None:
        job = SimpleNamespace(future=future, communicator=SimpleNamespace(event_id="e"))
        job.cancel_fn = job.communicator.__repr__
        task = asyncio.create_task(gradio_bounds._result(server, job))
        await asyncio.sleep(0)
        future.set_result("answer")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(hang_up())
    assert server._client_instance == "everybody's"
    answers: asyncio.Queue[object] = asyncio.Queue()
    queue = SimpleNamespace(pending_messages_per_session={"s": answers})
    event = SimpleNamespace(alive=True, session_hash="s", _id="e")
    gradio_bounds._keep(queue, event, ProcessCompletedMessage(output={}, success=True))
    assert (answers.qsize(), event.alive) == (1, False)


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Let the temporary files lie in the test's folder."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return monkeypatch


def test_files_of_gradio_go_to_a_folder_of_this_user_alone(
    tmp_path: Path, folders: pytest.MonkeyPatch
) -> None:
    places = []
    for chosen in (None, "", str(tmp_path / "chosen")):
        if chosen is None:
            folders.delenv("GRADIO_TEMP_DIR")
        else:
            folders.setenv("GRADIO_TEMP_DIR", chosen)
        importlib.reload(gradio_bounds)
        places.append(Path(gradio.Textbox().GRADIO_CACHE))
    folder = places[0]
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o777 == 0o700
    assert places == [folder, folder, tmp_path / "chosen"]


def test_without_a_private_folder_nothing_is_served(
    tmp_path: Path, folders: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o777)  # every user can put another folder there
    folders.setenv("GRADIO_TEMP_DIR", "")
    with pytest.raises(SystemExit) as ended:
        importlib.reload(gradio_bounds)
    line, _ = str(ended.value.code).splitlines()
    assert line.startswith("error[STORE_FAILED]: the private folder of gradio's files")


ALONE = """
import gradio, requests
from llama_space import guard
with gradio.Blocks(analytics_enabled=False) as demo:
    demo.load(lambda: "x", None, gradio.Textbox(), queue=False)
app, url, _ = demo.launch(prevent_thread_lock=True, quiet=True, **guard.options(10))
for number in range(120):
    asked = {"data": [], "fn_index": 0, "session_hash": f"s{number}"}
    requests.post(f"{url}gradio_api/run/predict", json=asked, timeout=60).raise_for_status()
print(app.static_worker_pool, demo.ssr_mode, len(app.state_holder.session_data))
"""


def test_no_other_process_serves_the_page_and_gradio_keeps_the_newest_visitors_alone() -> None:
    """Its workers, and Node, would answer in front of the guard; it kept 100 kB of 10,000."""
    named = {"GRADIO_NUM_WORKERS": "1", "GRADIO_SSR_MODE": "true"}
    spaces = {"PYTHONPATH": str(space.PROJECT / "spaces")}
    environment = {**os.environ, **spaces, **named}
    told = heard([sys.executable, "-c", ALONE], env=environment, check=True)
    assert told.stdout.strip() == "None False 100"


TOOLS = """
import gradio, requests, time
from concurrent.futures import ThreadPoolExecutor
from gradio import mcp, server_messages
from llama_loader.server import free_port
from llama_space import gradio_bounds as bounds, guard
ended, clients, client = [], [], mcp.Client
mcp.Client = lambda *given, **named: clients.append(client(*given, **named)) or clients[-1]
def slow(text: str) -> str:
    try:
        for _ in range(50):
            time.sleep(0.1)
            yield text
    finally:
        ended.append(time.monotonic())
with gradio.Blocks(analytics_enabled=False) as demo:
    gradio.api(slow, concurrency_limit=60)
demo.queue(max_size=60).launch(
    prevent_thread_lock=True, quiet=True, mcp_server=True, server_port=free_port(),
    **guard.options(10))
asked = {"jsonrpc": "2.0", "id": 1, "method": "tools/call",
         "params": {"name": "slow", "arguments": {"text": "x"}}}
headers = {"Accept": "application/json, text/event-stream"}
def call(timeout):
    url = f"{demo.local_url}gradio_api/mcp/"
    try:
        told = requests.post(url, json=asked, headers=headers, timeout=timeout).text
    except requests.RequestException:
        return "left"
    return "refused" if "too many calls" in told else told
with ThreadPoolExecutor(60) as callers:
    told = list(callers.map(call, [2] * 60))
    began = time.monotonic()
    requests.get(f"{demo.local_url}config", timeout=20).raise_for_status()
while len(ended) < told.count("left"):
    time.sleep(0.05)
kinds, left = sorted(set(told)), told.count("left")
told, running = [kinds, left, max(ended) - began < 2], demo._queue.event_ids_to_events
def await_running(number):
    while sum(event.alive for event in [*running.values()]) < number:
        time.sleep(0.01)
with ThreadPoolExecutor(16) as callers:
    honest = [callers.submit(call, 9) for _ in range(4)]
    await_running(4)
    list(callers.map(call, [0.01 * each for each in range(1, 60)]))
    told += ["isError\\":false" in one.result() for one in honest]
told += [len(clients), len(clients[0].pending_messages_per_event)]
with ThreadPoolExecutor(1) as callers:
    lost = callers.submit(call, 9)
    await_running(1)
    messages = demo._queue.pending_messages_per_session[clients[0].session_hash]
    messages.put_nowait(server_messages.CloseStreamMessage())
told += ["was lost" in lost.result(), "isError\\":false" in call(9), len(clients)]
tool, asked = asked, {**asked, "method": "prompts/get"}
told.append("Method not found" in call(9))
gradios = f"{demo.local_url}gradio_api/"
asked = {"data": ["x"], "fn_index": 0, "session_hash": "s"}
told.append(requests.post(f"{gradios}run/predict", json=asked).status_code)
event = requests.post(f"{gradios}call/slow", json={"data": ["x"]}).json()["event_id"]
asked = {"session_hash": event, "fn_index": 0, "event_id": event}
def cancel(_):
    return requests.post(f"{gradios}cancel", json=asked).status_code
told.append(requests.post(f"{gradios}cancel", json={**asked, "fn_index": 1}).status_code)
with ThreadPoolExecutor(8) as callers:
    list(callers.map(cancel, range(80)))
told.append(cancel(0))
bounds._MESSAGES = 20
event = requests.post(f"{gradios}call/slow", json={"data": ["x"]}).json()["event_id"]
while event in demo._queue.event_ids_to_events:
    time.sleep(0.05)
told.append(event in demo._queue.pending_messages_per_session)
told += requests.get(f"{gradios}call/slow/{event}").text.split("\\n")[:1]
bounds._MESSAGES, bounds._UNREAD_BY_ALL = 500, 2
for _ in range(3):
    event = requests.post(f"{gradios}call/slow", json={"data": ["x"]}).json()["event_id"]
told.append(event in demo._queue.pending_messages_per_session)
asked, bounds._UNREAD_BY_ALL = tool, 400
with ThreadPoolExecutor(4) as callers:
    for _ in range(4):
        callers.submit(call, 9)
    await_running(4)
    began = time.monotonic()
    demo.server.close()  # as Ctrl-C does
print(*told, time.monotonic() - began < 3)
"""


def test_calls_of_tools_leave_threads_for_the_page_and_end_with_their_caller() -> None:
    """Gradio waited for each in a thread in which routes and translations run: 60 were a halt.

    An event that is cancelled many times at once ends once, by its own function's number alone. One
    whose messages are not read ends, too: it grew by 5.5 kB a second, and 400 kept others out. A
    call gets its answer while others hang up, of whom gradio's client keeps nothing, or an error if
    that client loses it. Ctrl-C ends those that run: each kept the app from ending for minutes.
    """
    environment = {**os.environ, "PYTHONPATH": str(space.PROJECT / "spaces")}
    told = heard([sys.executable, "-c", TOOLS], env=environment, check=True)
    calls = "True True True True 1 0 True True 2"
    line = f"['left', 'refused'] 16 True {calls} True 404 404 404 False event: error True True"
    assert told.stdout.splitlines()[-1] == line
    assert "Traceback" not in told.stderr


LINE = """
import gradio, requests, threading
from llama_space import guard
released = threading.Event()
def slow() -> str:
    released.wait(20)
def quick() -> str:
    return "x"
with gradio.Blocks(analytics_enabled=False) as demo:
    gradio.api(slow, concurrency_limit=1)
    gradio.api(quick)
demo.queue().launch(prevent_thread_lock=True, quiet=True, **guard.options(10))
answers = demo._queue.pending_messages_per_session
answers.max_size = 4  # instead of 2,000
def send(name):
    asked = requests.post(f"{demo.local_url}gradio_api/call/{name}", json={"data": []})
    return asked.json()["event_id"]
def read(name, event):
    return requests.get(f"{demo.local_url}gradio_api/call/{name}/{event}").text
events = [send("slow") for _ in range(3)]
told = [read("quick", send("quick")).count("complete") for _ in range(6)]
told.append({*events} <= {*answers})
answers.pop(events[1])  # as where its reader hangs up
released.set()
print(*told, *("event: complete" in read("slow", event) for event in events))
"""


def test_line_goes_on_after_more_sessions_than_gradio_keeps() -> None:
    """It dropped the oldest, also one whose event waited: that ended its line, for all visitors."""
    environment = {**os.environ, "PYTHONPATH": str(space.PROJECT / "spaces")}
    told = heard([sys.executable, "-c", LINE], env=environment, check=True)
    assert told.stdout.splitlines()[-1] == "1 1 1 1 1 1 True True False True"
    assert "Traceback" not in told.stderr


CANCELLED = """
import gradio, requests, threading, time
from concurrent.futures import ThreadPoolExecutor
from gradio import queueing, routes
from llama_space import guard
running, closed, name = [], [], queueing.set_task_name
released, closing = threading.Event(), threading.Event()
def slow() -> str:
    running.append(1)
    try:
        yield "x"
        released.wait(20)
        yield "y"
    finally:
        closed.append(closing.wait(5))
        running.pop()
def named(task, session, *given):
    name(task, session, *given)
    if session == "early":  # a cancellation comes before the first step of its task
        routes.cancel_tasks({"early_0"}).send(None)
queueing.set_task_name = named
with gradio.Blocks(analytics_enabled=False) as demo:
    gradio.api(slow, concurrency_limit=9)
demo.queue().launch(prevent_thread_lock=True, quiet=True, **guard.options(10))
def post(route, asked):
    return requests.post(f"{demo.local_url}gradio_api/{route}", json=asked, timeout=30)
def begin(session):
    asked = {"data": [], "fn_index": 0, "session_hash": session}
    return {**asked, "event_id": post("queue/join", asked).json()["event_id"]}
def cancel(event):
    return post("cancel", event).status_code
begin("early")
(line,), kept, told = demo._queue.event_queue_per_concurrency_id.values(), demo.app.iterators, []
def await_step(event):
    while event["event_id"] not in kept:
        time.sleep(0.01)
with ThreadPoolExecutor() as callers:
    await_step(first := begin("s"))
    told.append(callers.submit(cancel, first))
    time.sleep(0.2)  # gradio would wait for the step; the second cancels the first's task anew
    told.append(callers.submit(cancel, begin("s")))
    time.sleep(0.2)
    at_once = all(one.done() for one in told)
    told.append(callers.submit(cancel, first))
    released.set()
released.clear()
await_step(begin("x<gradio-sep>y"))
await_step(last := begin("last"))
codes = [one.result() for one in told] + [cancel(last)]
closing.set()
released.set()
end = time.monotonic() + 5
while time.monotonic() < end and (running or kept or line.current_concurrency):
    time.sleep(0.05)
jobs = demo._queue.get_active_worker_count()
print(at_once, all(closed), *codes, running, kept, line.current_concurrency, jobs)
"""


def test_event_that_is_cancelled_at_any_time_gives_its_place_back() -> None:
    """Gradio's end of its task left places taken for ever, and one name kept all from cancelling.

    No request waits for a step that is cancelled; the second of an event is refused. The
    page answers while generators are being closed.
    """
    environment = {**os.environ, "PYTHONPATH": str(space.PROJECT / "spaces")}
    told = heard([sys.executable, "-c", CANCELLED], env=environment, check=True)
    assert told.stdout.splitlines()[-1] == "True True 200 200 404 200 [] {} 0 0"
    assert "Traceback" not in told.stderr


EXAMINED = """
import requests, threading
from llama_loader import settings
from llama_loader.server import free_port
from tests.rigs.held_page import Held
from translator.page import Page
released = threading.Event()
class Slow(Held):
    def doctor(self):
        released.wait(20)
        return super().doctor()
page = Page(Slow(), settings.load(environ={}))
page.launch(prevent_thread_lock=True, quiet=True, server_port=free_port())
gradios = page.demo.local_url + "gradio_api/"
known = requests.get(page.demo.local_url + "config").json()["dependencies"]
(examine,) = (one["id"] for one in known if one["api_name"] == "diagnose")
def press(number):
    asked = {"data": [], "fn_index": examine, "session_hash": f"s{number}"}
    return requests.post(f"{gradios}queue/join", json=asked).status_code
def read(number):
    return requests.get(f"{gradios}queue/data?session_hash=s{number}").text
told = [press(number) for number in range(30)]
told.append("Too many visitors are waiting" in read(29))
told.append(requests.post(f"{gradios}call/detect", json={"data": ["Hello."]}).status_code)
released.set()
print({*told}, "Too many visitors are waiting" in read(0))
"""


def test_visitors_who_wait_for_an_examination_keep_no_text_out() -> None:
    """Gradio has 20 places for all who wait, whatever they wait for."""
    path = os.pathsep.join(map(str, (space.PROJECT, space.PROJECT / "spaces")))
    environment = {**os.environ, "PYTHONPATH": path}
    told = heard([sys.executable, "-c", EXAMINED], env=environment, check=True)
    assert told.stdout.splitlines()[-1] == "{200, True} False"
