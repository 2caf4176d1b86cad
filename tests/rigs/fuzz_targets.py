"""Every parser of bytes from outside: how its inputs are made, and what reads them.

An input is right to be refused with an error of the loader, or to be read. All else is a finding.
"""

import base64
import contextlib
import io
import itertools
import json
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Final, NamedTuple
from unittest import mock

import minisign
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from llama_loader import (
    client,
    cuda_libraries,
    devices,
    disk,
    foreign,
    gguf_header,
    gpus,
    host,
    hub,
    manifest,
    model,
    model_file,
    processes,
    selection,
    server_log,
    settings,
    store_folder,
    trust,
    unpack,
)
from llama_loader.errors import LoaderError
from llama_loader.fetch import Fetcher
from llama_loader.locations import Patience
from llama_loader.receipt import Receipt
from llama_loader.store import Store
from tests.rigs import archives, into_store, mutations
from tests.rigs.archives import GOOD, link


class Target(NamedTuple):
    """``make`` an input; ``read`` it in a folder of its own that is empty at the first input.

    It gets one of ``share`` of the inputs that are asked for: some are slow.
    """

    make: Callable[[Random], bytes]
    read: Callable[[bytes, Path], object]
    share: int = 1


# manifests and the store's files

_PACKED, _ARTIFACT = archives.release()
_CUDA = archives.describe(
    _PACKED,
    name="s",
    backend="cuda",
    cuda=manifest.Cuda(toolkit="12.8", min_driver="525.60", sass=("90",), ptx=()),
    needs=("libcublas.so.12", "libcuda.so.1"),
)
_RUNTIME = archives.describe(
    _PACKED, name="c", kind="cuda-runtime", provides=("llama-server", "libllama.so.0")
)
_MANIFEST: Final = archives.manifest(_ARTIFACT, _RUNTIME, _CUDA)
_HOST: Final = host.HostFacts(
    "linux",
    "x86_64",
    *("2.36", "3.4.30"),
    gpus=(gpus.Gpu("NVIDIA H200", "90", 1 << 37, "GPU-1", 1 << 37),),
    libraries=(cuda_libraries.Library("libcublas.so.12", Path("/x"), "12.8", "toolkit"),),
)


def _read_manifest(data: bytes, _: Path) -> None:
    found = manifest.parse(data)
    for artifact in found.artifacts:
        artifact.resolved_urls("https://127.0.0.1/x/manifest.json")
        assert "/" not in artifact.name
        assert len(artifact.sha256) == 64
        assert sum(entry.size for entry in artifact.files) == artifact.unpacked_size
        for entry in artifact.files:
            assert not {"..", ".", ""} & set(entry.path.split("/"))
    assert manifest.parse(manifest.dump(found)) == found
    for allowed in (False, True):
        with contextlib.suppress(LoaderError):
            selection.select(found, _HOST, allow_cpu=allowed)
    for artifact in found.artifacts:
        cuda_libraries.split_needs(artifact.needs, _HOST.libraries)


_PIN: Final = json.dumps(
    {
        "manifest_url": "https://127.0.0.1/manifest.json",
        "public_key": "RWQ",
        "project": "me/builds",
        "channel": "stable",
        "min_serial": 7,
    }
).encode()


def _read_pin(data: bytes, folder: Path) -> None:
    place = folder / "release.json"
    place.write_bytes(data)
    trust.read(place)


_RECEIPT: Final = manifest.dump(Receipt(sha256=_ARTIFACT.sha256, artifact=_ARTIFACT))


def _read_receipt(data: bytes, folder: Path) -> None:
    root = folder / _ARTIFACT.sha256
    root.mkdir(exist_ok=True)
    (root / "receipt.json").write_bytes(data)
    with disk.Folder.open(root) as place:
        Receipt.read(place).installed(root, None, lambda _: None).verify()


def _read_marker(data: bytes, folder: Path) -> None:
    (folder / "FORMAT").write_bytes(data)
    (folder / "runtimes").mkdir(exist_ok=True)
    store_folder.open_store(folder, make=False).__exit__()


@cache
def _keys() -> tuple[bytes, str, bytes]:
    """Return a channel's manifest, its public key, and its signature; the keys are a seed's."""
    made = Ed25519PrivateKey.from_private_bytes(bytes(32))
    with (
        mock.patch.object(Ed25519PrivateKey, "generate", return_value=made),
        mock.patch("secrets.token_bytes", return_value=bytes(8)),
    ):
        keys = minisign.KeyPair.generate()
    now = datetime(2026, 11, 29, tzinfo=timezone.utc)
    data = archives.manifest(_ARTIFACT, serial=7, created=now, expires=now.replace(month=12))
    comment = trust.signed_for("me/builds", "stable", 7, "b1-1")
    signature = keys.secret_key.sign(data, trusted_comment=comment)
    return data, keys.public_key.to_base64().decode(), bytes(signature)


def _make_signature(random: Random) -> bytes:
    return mutations.signature(random, _keys()[2])


def _read_signature(data: bytes, _: Path) -> None:
    content, key, signature = _keys()
    trust.signed_comment(content, data, key, "it")
    for odd in (data[:90].decode("utf-8", "replace"), key[:-4] + data[-4:].decode("latin-1")):
        with contextlib.suppress(LoaderError):
            trust.signed_comment(content, signature, odd, "it")


def _make_channel(random: Random) -> bytes:
    content, _, signature = _keys()
    kept = [base64.b64encode(one).decode() for one in (content, signature)]
    return mutations.json_text(random, json.dumps(kept).encode())


def _read_channel(data: bytes, folder: Path) -> None:
    pin = trust.Pin(
        manifest_url="https://127.0.0.1/m",
        public_key=_keys()[1],
        project="me/builds",
        channel="stable",
    )
    channel = trust.SignedChannel(pin, Store(folder), lambda _: None)
    place = folder / "channels" / channel._folder
    place.mkdir(parents=True, exist_ok=True)
    (place / "7.json").write_bytes(data)
    _rendered(lambda: channel.manifest(Fetcher(offline=True)))


# models

_KEYS: Final = (
    ("general.architecture", 8, struct.pack("<Q", 5) + b"llama"),
    ("tokenizer.chat_template", 8, struct.pack("<Q", 4) + b"{{}}"),
    *((f"llama.{name}", 4, struct.pack("<I", 32)) for name in ("block_count", "context_length")),
    *(
        (f"llama.attention.{name}", 5, struct.pack("<i", 8))
        for name in ("head_count", "key_length")
    ),
    ("tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 2) + (b"\1" + bytes(7) + b"x") * 2),
)


def _read_gguf(data: bytes, folder: Path) -> None:
    place = folder / f"m{next(_NUMBER)}.gguf"
    place.write_bytes(data)
    if not data or data[-1] % 3 == 0:
        os.truncate(place, 1 << 38)  # sparse: claims of any size come true
    try:
        gguf_header.measure(place, 0)
        model_file.require_usable(place)
    finally:
        place.unlink()


_NUMBER: Final = itertools.count()

# archives

_THEIRS: Final = (*GOOD, link("runtime/libllama.so", "libllama.so.0"), link("current", "runtime"))
_FORMS: Final = ("tar.gz", "tar.xz", "tar.zst")


def _make_tar(random: Random) -> bytes:
    plain = mutations.tarball(random, random.choice((GOOD, _THEIRS)))
    return mutations.packed(random, plain, random.choice(_FORMS))


def _read_listed(data: bytes, folder: Path) -> None:
    with _emptied(folder) as into:
        pieces = (data[at : at + 1000] for at in range(0, len(data), 1000))
        unpack.unpack(pieces, _entry(_form(data)), into)


def _form(data: bytes) -> str:
    return next((form for magic, form in _MAGIC.items() if data.startswith(magic)), "tar.gz")


_MAGIC: Final = {b"\xfd7z": "tar.xz", b"\x28\xb5": "tar.zst"}


@cache
def _entry(form: str) -> manifest.Artifact:
    return archives.describe(_PACKED, form=form)


def _read_foreign(data: bytes, folder: Path) -> None:
    with _emptied(folder) as into:
        foreign.unpack(io.BytesIO(data), "it", into)


def _make_listed(random: Random) -> bytes:
    """Return an archive behind the number of what its manifest says of it."""
    data = bytearray(_make_tar(random))
    what = random.randrange(8)
    if what == 0:
        del data[random.randrange(1, len(data)) :]
    elif what == 1:
        data += random.randbytes(100)
    return bytes([random.randrange(len(into_store.LISTINGS)), *data])


def _read_into_store(data: bytes, _: Path) -> None:
    number = data[0] % len(into_store.LISTINGS)
    listing, packed = into_store.LISTINGS[number], data[1:]
    artifact = archives.describe(packed, listing, _form(packed), 100 if number % 2 else 65536)
    into_store.install_listed(packed, artifact)


@contextlib.contextmanager
def _emptied(folder: Path) -> Any:
    """Give a folder below; whatever is in it is removed, and nothing may lie beside it."""
    with mock.patch("os.fsync", int), disk.Folder.open(folder) as place:
        try:
            (folder / "into").mkdir()
            yield folder / "into"
        finally:
            place.remove("into")
            assert place.names() == []


# what programs print


def _printed(data: bytes) -> str:
    """Return as much of an output as ``processes.run`` does."""
    return data[: 1 << 20].decode("utf-8", "replace")


_LOG: Final = b"""0.00.001.000 I build: 11549 with cc for x86_64
0.00.100.000 I llama_model_loader: - kv   0: general.name str = tiny
0.00.101.000 I load_tensors: offloaded 27/27 layers to GPU
0.00.102.000 I load_tensors:        CUDA0 model buffer size =  1024.50 MiB
load_tensors:   CPU_Mapped model buffer size =   12.00 MiB
0.00.103.000 E ggml_backend_cuda_buffer_type_alloc_buffer: cudaMalloc failed: out of memory
error while loading shared libraries: libcublas.so.12: cannot open shared object file
symbol lookup error: undefined symbol: x
version `GLIBC_2.38' not found"""


def _read_log(data: bytes, _: Path) -> None:
    log = server_log.ServerLog()
    log.read(io.BytesIO(data))
    log.finish(60.0)
    assert log._ended.is_set()
    log.report.on_devices(("CUDA0",))
    for status in (1, -9):
        server_log.explain(status, log.tail(), loading=True).render()


_DEVICES: Final = b"""ggml_cuda_init: found 2 CUDA devices:
CUDA error: no CUDA-capable device is detected
version `X' not found
Available devices:
  CUDA0: NVIDIA H200 (143771 MiB, 143000 MiB free)
  CUDA1: NVIDIA H100 (81559 MiB, 80994 MiB free)
  RPC0[127.0.0.1:50052]: RPC (1 MiB, 1 MiB free)"""


def _read_devices(data: bytes, _: Path) -> None:
    printed = _printed(data)
    found = devices.parse(printed)
    for one, wanted in ((found, ()), (found, ("cuda1",)), ((), ())):
        with contextlib.suppress(LoaderError):
            devices.choose(one, wanted, needed=1 << 37, allow_cpu=False, printed=printed)


_SMI: Final = b"""Warning: persistence mode is off
NVIDIA H200, 9.0, 143771, 580.95.05, GPU-11111111-2222-3333-4444-555555555555
NVIDIA RTX PRO 6000 Blackwell, [N/A], [N/A], 580.95.05, GPU-2"""


def _read_smi(data: bytes, _: Path) -> None:
    found = host.parse(_printed(data))
    for named in (None, "0,1", data[:40].decode("utf-8", "replace")):
        gpus.visible(found.gpus, named, None)


_LDCONFIG: Final = b"""3 libs found in cache `/etc/ld.so.cache'
\tlibstdc++.so.6 (libc6,x86-64) => /usr/lib/x86_64-linux-gnu/libstdc++.so.6
\tlibcublas.so.12 (libc6,x86-64) => /usr/local/cuda/lib64/libcublas.so.12
\tlibcuda.so.1 (libc6,x86-64) => /usr/lib/x86_64-linux-gnu/libcuda.so.1"""


def _read_ldconfig(data: bytes, folder: Path) -> None:
    printed = processes.Finished(0, _printed(data), 0.0)
    with mock.patch.object(processes, "run", return_value=printed):
        found = cuda_libraries.linker_cache({})
    cuda_libraries.driver_folders((folder,), found)
    cuda_libraries.find_libraries((), found, (), folder)
    host._glibcxx(found)


_KERNEL: Final = {
    "proc/self/cgroup": "4:cpu,cpuacct:/docker/0123\n0::/x/y",
    "proc/meminfo": "MemTotal:       24684012 kB\nMemFree: 1 kB",
    "sys/fs/cgroup/cpu.max": "250000 100000",
    "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
    "sys/fs/cgroup/memory.max": "2147483648",
    "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.95.05  x",
    "proc/driver/nvidia/gpus/0/information": "Model: \t NVIDIA H200\nGPU UUID: \t GPU-1",
    "proc/cpuinfo": "model name\t: Intel(R) Xeon(R)",
}


def _read_kernel(data: bytes, folder: Path) -> None:
    for (name, _), text in zip(_KERNEL.items(), data.split(b"\f"), strict=False):
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(text)
    printed = processes.Finished(0, "", 0.0)
    with mock.patch.object(processes, "run", return_value=printed):
        host.detect(_settings(), root=folder)


@cache
def _settings() -> settings.Settings:
    return settings.load({}, {"HOME": "/nowhere"}, hf_endpoint=_server().url)


# answers over HTTP

_ANSWER: Final = (
    b'{"choices":[{"text":"x","delta":{"content":"y"},"finish_reason":null}],'
    b'"timings":{"predicted_n":5,"predicted_per_second":1.5},"error":{"message":"m","code":500}}'
)


@dataclass
class _Server:
    """Sends ``answer``, whatever it is, to every connection, the moment it is made.

    It does so in the thread that connects: waiting for another one took most of an input's time.
    """

    listener: socket.socket
    answer: bytes = b""
    last: socket.socket | None = None

    @property
    def port(self) -> int:
        return int(self.listener.getsockname()[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self, ours: socket.socket, address: object) -> None:
        """Connect, and send the answer if it is to this server."""
        _CONNECT(ours, address)
        if address != ("127.0.0.1", self.port):
            return
        if self.last:
            self.last.close()
        self.last, _ = self.listener.accept()
        self.last.settimeout(0.0)
        sent = self.last.send(self.answer) if self.answer else 0
        if sent == len(self.answer):
            self.last.shutdown(socket.SHUT_WR)
        else:
            threading.Thread(target=self.send, args=(self.last, sent), daemon=True).start()

    def send(self, connection: socket.socket, start: int) -> None:
        """Send what the kernel did not take at once."""
        with contextlib.suppress(OSError):
            connection.settimeout(2.0)
            connection.sendall(self.answer[start:])
            connection.shutdown(socket.SHUT_WR)


_CONNECT: Final[Callable[[socket.socket, Any], None]] = socket.socket.connect


@cache
def _server() -> _Server:
    return _Server(socket.create_server(("127.0.0.1", 0), backlog=50))


@contextlib.contextmanager
def _answering(answer: bytes) -> Iterator[_Server]:
    """Give the server, which answers so."""
    server = _server()
    server.answer = answer

    def connect(ours: socket.socket, address: object) -> None:
        server.connect(ours, address)

    with mock.patch.object(socket.socket, "connect", connect):
        yield server


def _make_download(random: Random) -> bytes:
    return mutations.http(random, mutations.flip(random, _MANIFEST[:300]))


def _read_download(data: bytes, _: Path) -> None:
    patience = Patience(attempts=1, headers=4.0, silence=1.0, deadline=4.0)
    fetcher = Fetcher(sleep=lambda _: None, patience=patience)
    connect = socket.create_connection
    with (
        _answering(data) as server,
        mock.patch(  # redirects lead to this server, whatever they name
            "urllib3.util.connection.create_connection",
            lambda _, *words, **_options: connect(("127.0.0.1", server.port), *words[:1]),
        ),
    ):
        _rendered(lambda: fetcher.read(f"{server.url}/x", limit=65536))


def _rendered(call: Callable[[], object]) -> None:
    """Show the error, too: what is shown went through patterns."""
    try:
        call()
    except LoaderError as error:
        error.render()


def _make_answer(random: Random) -> bytes:
    return mutations.http(random, mutations.json_text(random, _ANSWER))


def _make_stream(random: Random) -> bytes:
    return mutations.http(random, mutations.events(random, _ANSWER))


def _read_answer(data: bytes, _: Path) -> None:
    with _answering(data) as server:
        ours = client.Client(server.port, "key", timeout=4.0)
        ours.health()
        _rendered(lambda: ours.completion("x", max_tokens=1))


def _read_stream(data: bytes, _: Path) -> None:
    with _answering(data) as server:
        ours = client.Client(server.port, "key", timeout=4.0)
        _rendered(lambda: [*ours.chat([], max_tokens=1)])


def _make_hub(random: Random) -> bytes:
    return mutations.http(random, random.choice((b"", mutations.json_text(random, _ANSWER))))


def _read_hub(data: bytes, _: Path) -> None:
    place = replace(_settings(), hf_endpoint=_server().url, gguf_repo_id="me/model")
    with _answering(data), mock.patch("time.sleep", float):
        _rendered(lambda: hub.size(model.named(place)))


def _of_json(sample: bytes) -> Callable[[Random], bytes]:
    def make(random: Random) -> bytes:
        data = mutations.json_text(random, sample)
        return mutations.flip(random, data) if random.random() < 0.1 else data

    return make


def _of_lines(sample: bytes) -> Callable[[Random], bytes]:
    def make(random: Random) -> bytes:
        change = mutations.flip if random.random() < 0.1 else mutations.lines
        return change(random, sample)

    return make


TARGETS: Final = {
    "manifest": Target(_of_json(_MANIFEST), _read_manifest),
    "release.json": Target(_of_json(_PIN), _read_pin),
    "receipt": Target(_of_json(_RECEIPT), _read_receipt),
    "store marker": Target(_of_lines(store_folder.MARKER.encode()), _read_marker),
    "signature": Target(_make_signature, _read_signature),
    "channel file": Target(_make_channel, _read_channel),
    "gguf": Target(lambda random: mutations.gguf(random, _KEYS), _read_gguf),
    "tar of a manifest": Target(_make_tar, _read_listed),
    "tar by URL": Target(_make_tar, _read_foreign),
    "zip by URL": Target(mutations.zipped, _read_foreign),
    "archive to store": Target(
        _make_tar, lambda data, _: into_store.install_by_url(data), share=50
    ),
    "listed archive to store": Target(_make_listed, _read_into_store, share=50),
    "download": Target(_make_download, _read_download),
    "answer": Target(_make_answer, _read_answer),
    "stream": Target(_make_stream, _read_stream),
    "hub": Target(_make_hub, _read_hub),
    "log": Target(_of_lines(_LOG), _read_log),
    "devices": Target(_of_lines(_DEVICES), _read_devices),
    "nvidia-smi": Target(_of_lines(_SMI), _read_smi),
    "ldconfig": Target(_of_lines(_LDCONFIG), _read_ldconfig),
    "kernel's files": Target(_of_lines("\f".join(_KERNEL.values()).encode()), _read_kernel),
}
"""By name."""
