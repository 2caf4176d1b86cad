"""Stands in for llama-server: does what ``behaviour.json`` beside it says.

Where its weights are it says as llama-server does: on all devices that it is given, all layers;
some of them where it is to find out how many fit (``--n-gpu-layers -1``).
Keys: ``list`` {text, status, sleep, signal} for --list-devices; ``say`` lines to print (instead of
that where they speak of layers or buffers); ``mute`` says nothing of it, as with --log-disable;
``reaches``: how many of its devices get a part; ``flood`` bytes to print at once; ``exit`` status
or ``signal`` number to end with before it listens; ``never_listen``: at all, or on this port;
``loading`` seconds of 503; ``completion``: ok, hang, die, refuse, garbage; ``chat``: ok, die,
refuse; ``between`` seconds between its words; ``deaf`` ignores SIGTERM; ``child`` starts a child
that sleeps; ``answers``: how many completions are answered before one hangs; ``stuck_after``
seconds: /slots hangs; ``known_devices``: what --device may name; ``bad_starts``: how many starts do
all this, later ones behave well.
"""

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).absolute().parent
DO = json.loads((HERE / "behaviour.json").read_text())
NOTES = HERE.parents[2] if HERE.parent.name == "files" else HERE
"""Where it writes: beside itself; in a store beside the runtime, whose files are hashed again."""
STARTED = time.monotonic()


def option(name: str) -> str | None:
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else None


def note_down() -> None:
    seen = {
        "argv": sys.argv[1:],
        "environ": dict(os.environ),
        "pid": os.getpid(),
        "cwd": str(Path.cwd()),
    }
    # in one step: whoever waits for the file may read it as soon as it is there
    (NOTES / "seen.tmp").write_text(json.dumps(seen))
    (NOTES / "seen.tmp").replace(NOTES / "seen.json")
    with (NOTES / "starts").open("a") as file:
        file.write(f"{os.getpid()}\n")


def list_devices() -> None:
    do = DO.get("list", {})
    sys.stdout.write(do.get("text", "Available devices:\n  (none)\n"))
    sys.stdout.flush()
    time.sleep(do.get("sleep", 0))
    if do.get("signal"):
        os.kill(os.getpid(), do["signal"])
    sys.exit(do.get("status", 0))


class Handler(http.server.BaseHTTPRequestHandler):
    key = ""

    def log_message(self, *args: object) -> None:
        pass

    def answer(self, status: int, document: object) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refused(self) -> bool:
        if not self.key or self.headers.get("Authorization") == f"Bearer {self.key}":
            return False
        self.answer(401, {"error": {"message": "Invalid API Key"}})
        return True

    def do_GET(self) -> None:
        if self.path == "/health":
            loading = time.monotonic() - STARTED < DO.get("loading", 0)
            self.answer(503 if loading else 200, {})
        elif not self.refused():
            if DO.get("stuck_after") is not None and self.path == "/slots":
                time.sleep(3600 if time.monotonic() - STARTED > DO["stuck_after"] else 0)
            self.answer(200, {})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))))
        if self.refused():
            return
        do = DO.get("completion", "ok")
        if DO.get("answers") is not None:
            DO["answers"] -= 1
            do = "hang" if DO["answers"] < 0 else do
        if do == "hang":
            time.sleep(3600)
        elif do == "die":
            sys.stdout.write("CUDA error: an illegal memory access was encountered\n")
            sys.stdout.flush()
            os.abort()
        elif do == "refuse":
            self.answer(500, {"error": {"message": "the context is full"}})
        elif do == "garbage":
            self.answer(200, ["not", "llama"])
        elif asked.get("stream") or "chat" in self.path:
            self.chat()
        else:
            self.answer(200, {"choices": [{"text": "!", "finish_reason": "length"}]})

    def chat(self) -> None:
        """Stream ``words``; ``chat``: die (after one), refuse."""
        if DO.get("chat") == "refuse":
            self.answer(400, {"error": {"message": "the prompt is too long for the context size"}})
            return
        self.send_response(200)
        self.end_headers()
        for word in DO.get("words", ("one", " two", " three")):
            said = {"delta": {"content": word}} if "chat" in self.path else {"text": word}
            delta = {**said, "finish_reason": None}
            self.wfile.write(f"data: {json.dumps({'choices': [delta]})}\n\n".encode())
            self.wfile.flush()
            if DO.get("chat") == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(DO.get("between", 0))
        last = {
            "choices": [{"delta": {}, "finish_reason": "stop"}],
            "timings": {"predicted_n": 3, "predicted_per_second": 50.0},
        }
        self.wfile.write(f"data: {json.dumps(last)}\n\ndata: [DONE]\n\n".encode())


class Listener(http.server.ThreadingHTTPServer):
    def server_bind(self) -> None:
        if "--reuse-port" in sys.argv:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        super().server_bind()


DO.setdefault("known_devices", ["CUDA0", "CUDA1"])


def report() -> None:
    """Say where the weights went, in the words of src/llama-model.cpp."""
    told = any("offloaded" in line or "buffer size" in line for line in DO.get("say", []))
    if told or DO.get("mute") or "--log-disable" in sys.argv:
        return
    wanted = int(option("--n-gpu-layers") or 0)
    names = (option("--device") or "none").split(",")[: DO.get("reaches")]
    on_gpu = [name for name in names if name != "none" and wanted]
    layers = (31 if wanted > 0 else 12) if on_gpu else 0
    print(f"load_tensors: offloaded {layers}/31 layers to GPU")
    for name in on_gpu:
        print(f"load_tensors: {name:>12} model buffer size =   900.00 MiB")
    print("load_tensors:   CPU_Mapped model buffer size =    92.10 MiB", flush=True)


def misbehave() -> None:
    """Everything that happens before it listens."""
    if DO.get("deaf"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if DO.get("child"):
        child = subprocess.Popen(["/bin/sleep", "3600"])
        (HERE / "child").write_text(str(child.pid))
    unknown = set((option("--device") or "none").split(",")) - {"none", *DO["known_devices"]}
    if unknown:
        print(f'error while handling argument "--device": invalid device: {unknown.pop()}')
        sys.exit(1)
    for line in DO.get("say", []):
        print(line, flush=True)
    sys.stdout.write(("x" * 999 + "\n") * (DO.get("flood", 0) // 1000))
    sys.stdout.flush()
    if DO.get("signal"):
        os.kill(os.getpid(), DO["signal"])
    if "exit" in DO:
        sys.exit(DO["exit"])
    if DO.get("never_listen") in {True, int(option("--port") or 0)}:
        time.sleep(3600)


def serve() -> None:
    key_file = option("--api-key-file")
    if key_file:
        Handler.key = Path(key_file).read_text().strip()
    Listener(("127.0.0.1", int(option("--port") or 0)), Handler).serve_forever()


note_down()
if "--list-devices" in sys.argv:
    list_devices()
if DO.get("bad_starts") is not None:
    starts = len((NOTES / "starts").read_text().splitlines())
    if starts > DO["bad_starts"]:
        known = DO["known_devices"]
        DO.clear()
        DO["known_devices"] = known
misbehave()
report()
serve()
