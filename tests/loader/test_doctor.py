import json
import os
import socket
import sys
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest

from llama_loader import doctor, selection, self_test
from llama_loader.doctor import Examination
from llama_loader.errors import HostError, LoaderError, NetworkError, SettingError
from llama_loader.events import Note, Sink, Timeline, ignore
from llama_loader.host import HostFacts
from llama_loader.loader import Prepared
from llama_loader.manifest import dump
from llama_loader.settings import Settings, load
from tests.rigs import hub
from tests.rigs.impostor_archive import Impostor
from tests.rigs.releases import BARE, H200, Unlisted, artifact, manifest, runtime

RELEASE = manifest(
    artifact("cu130", "sm90", "90"), artifact("cu130", "sm120", "120a"), artifact("cpu", "cpu")
)
LIST = {"text": "Available devices:\n  CUDA0: NVIDIA H200 (143155 MiB, 142629 MiB free)\n"}


class Clinic:
    """A doctor whose host and release are given; llama-server is the impostor."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, runtime: Path, store: Path) -> None:
        self.host: HostFacts = H200
        self.runtime = runtime
        self.fault: LoaderError | None = None
        self.note = Note("MANIFEST_NOT_PINNED", "it is not", "pin it")
        self.variables = {
            "PATH": os.environ["PATH"],
            "HF_HOME": str(store),
            "LD_LIBRARY_PATH": "/none:/usr/lib",
            "YAKULINGO_SPACES_LLAMA_CPP_MANIFEST_URL": "https://h/manifest.json",
            "YAKULINGO_SPACES_LLAMA_CPP_MANIFEST_SHA256": "0" * 64,
            "YAKULINGO_SPACES_GGUF_PATH": str(self_test.MODEL),
        }
        monkeypatch.setattr(doctor.host, "detect", lambda _: self.host)
        monkeypatch.setattr(doctor.loader, "prepare", self.prepare)

    def prepare(self, settings: Settings, *, sink: Sink) -> Prepared:
        if self.fault:
            raise self.fault
        sink(self.note)
        choice = selection.select(
            RELEASE, self.host, arch=settings.cuda_arch, allow_cpu=settings.allow_cpu
        )
        place = self.runtime
        installed = Unlisted(place, place, "0" * 64, choice.artifact)
        return Prepared(installed, self.host, choice, choice.libraries, choice.missing, Timeline())

    def examine(self, **variables: str) -> Examination:
        names = {f"YAKULINGO_SPACES_{name}": value for name, value in variables.items()}
        return doctor.examine(lambda: load(environ={**self.variables, **names}), sink=ignore)


@pytest.fixture
def clinic(monkeypatch: pytest.MonkeyPatch, impostor: Impostor, tmp_path: Path) -> Clinic:
    return Clinic(monkeypatch, impostor.behave(list=LIST), tmp_path / "store")


def failures(found: Examination) -> dict[str, str]:
    return {check.name: check.code for check in found.checks if not check.ok}


def test_a_gpu_that_can_serve(clinic: Clinic) -> None:
    """Also where another one is lost."""
    clinic.host = replace(H200, complaints=("GPU 1 is left out: NVML: GPU is lost (15)",))
    found = clinic.examine()
    assert (found.exit_status, failures(found)) == (0, {})
    names = ["settings", "gpu", "store", "runtime", "libraries", "devices", "test run", "model"]
    assert [check.name for check in found.checks] == names
    page = found.as_text()
    for words in (
        "NVIDIA H200, compute capability 9.0, 150 GB",
        "driver: 580.159",
        "complaint: GPU 1 is left out",
        "libcublas.so.13 (version unknown) in /cu13 (site-packages)",
        "cu130-sm90-linux-x86_64.tar.zst: chosen: machine code for 9.0; 20.0 MB",
        "cu130-sm120-linux-x86_64.tar.zst: CUDA 13.0 for 12.0a: not for 9.0",
        "ok   devices: CUDA0 (the only one: NVIDIA H200)",
        "note MANIFEST_NOT_PINNED: it is not",
        "a model can be served here now",
    ):
        assert words in page
    told = json.loads(json.dumps(found.as_json()))
    assert told["host"]["gpus"][0]["capability"] == "90"
    assert told["choice"]["libraries"]["libcudart.so.13"] == "/cu13"


@pytest.mark.parametrize("change", ["", "a missing field", "another type"])
def test_the_doctors_json_is_of_its_schema(clinic: Clinic, change: str) -> None:
    schema = doctor.json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    clinic.fault = NetworkError("UNREACHABLE", "x") if change else None
    for variables in ({}, {"N_CTX": "many"}, {"LLAMA_DEVICE": "Vulkan0"}):
        told = json.loads(json.dumps(clinic.examine(**variables).as_json()))
        jsonschema.validate(told, schema)
    if change == "a missing field":
        del told["checks"]
    elif change:
        told["checks"][0]["ok"] = "yes"
    if change:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(told, schema)


@pytest.mark.model
def test_model_that_the_installed_server_does_not_know_is_found(
    clinic: Clinic, real_runtime: Path, tmp_path: Path
) -> None:
    clinic.runtime, clinic.host, model = real_runtime, BARE, tmp_path / "m.gguf"
    for known, unknown in ((b"llama", b"llamq"), (b"context_", b"kontext_")):
        model.write_bytes(self_test.MODEL.read_bytes().replace(known, unknown, 1))
        found = clinic.examine(ALLOW_CPU="1", GGUF_PATH=str(model))
        assert (failures(found), found.exit_status) == ({"model": "BAD_MODEL"}, 7)


def test_taken_port_and_another_model_than_the_pinned_one_are_found(clinic: Clinic) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        found = clinic.examine(LLAMA_SERVER_PORT=port, GGUF_SHA256="0" * 64)
    assert failures(found) == {"port": "PORT_IN_USE", "model": "MODEL_SHA256_MISMATCH"}
    assert found.exit_status == 7
    assert failures(clinic.examine(LLAMA_SERVER_PORT=port)) == {}


def test_missing_libraries_name_the_packages(clinic: Clinic) -> None:
    clinic.host = replace(H200, libraries=())
    found = clinic.examine()
    assert failures(found) == {"libraries": "CUDA_LIBRARY_MISSING"}
    assert found.exit_status == HostError.exit_status
    assert "hint: add to requirements.txt (or pip install): nvidia-cublas" in found.as_text()


@pytest.mark.parametrize(
    ("listing", "code", "hint"),
    [
        (LIST, "INVALID_DEVICE", "YAKULINGO_SPACES_LLAMA_DEVICE=auto"),
        ({"text": "what?"}, "DEVICE_LIST_GARBLED", "really a llama-server"),
    ],
)
def test_the_list_of_devices_decides(
    clinic: Clinic, impostor: Impostor, listing: dict[str, object], code: str, hint: str
) -> None:
    impostor.behave(list=listing)
    found = clinic.examine(LLAMA_DEVICE="Vulkan0" if code == "INVALID_DEVICE" else "auto")
    assert failures(found) == {"devices": code}
    assert hint in found.as_text()
    assert found.exit_status == 5


SMALL = "Available devices:\n  CUDA0: L4 (9 MiB, 8 MiB free)\n"
BOTH = f"{SMALL}  CUDA1: L4 (22500 MiB, 22000 MiB free)\n"


@pytest.mark.parametrize(
    ("listed", "variables", "words"),
    [
        (BOTH, {}, "ok   devices: CUDA1 (the fewest that hold"),
        (
            BOTH,
            {"GGUF_PATH": "", "GGUF_REPO_ID": "me/none", "GGUF_FILENAME": "none.gguf"},
            "devices: CUDA0, CUDA1 (all: the sizes are not known)",
        ),
        (BOTH, {"N_GPU_LAYERS": "0"}, "devices: the CPU (n_gpu_layers is 0"),
        (SMALL, {}, "CUDA0 (the only one: L4; 0.0 GB do not fit into 0.0 GB free, 0.5 GB"),
    ],
)
def test_the_model_that_is_set_decides_what_is_chosen(
    clinic: Clinic, impostor: Impostor, listed: str, variables: dict[str, str], words: str
) -> None:
    """As for a start: it is measured where it is here, and never fetched for that."""
    clinic.host = replace(H200, gpus=H200.gpus * 2, cpus=2, machine_cpus=64)
    impostor.behave(list={"text": listed})
    page = clinic.examine(**variables).as_text()
    assert words in page
    assert "x86_64, 2 of 64 CPUs, " in page


@pytest.mark.parametrize(
    ("source", "code"), [("/proc/driver/nvidia", "NO_DEVICE"), ("zerogpu", "NO_GPU")]
)
def test_zerogpu_s_main_process_is_told_where_gpus_come_from(
    clinic: Clinic, impostor: Impostor, source: str, code: str
) -> None:
    clinic.host = replace(H200, zerogpu=True, gpu_source=source)
    impostor.behave(list={})
    found = clinic.examine()
    assert code in failures(found).values()
    assert "inside a decorated function" in found.as_text()
    assert ("in Python allow_cpu=True" in found.as_text()) == (code == "NO_GPU")
    assert "Vulkan" not in found.as_text()


def test_a_fault_in_between_does_not_end_the_examination(
    clinic: Clinic, monkeypatch: pytest.MonkeyPatch
) -> None:
    clinic.fault = NetworkError("UNREACHABLE", "no route\nto host", hint="look")
    found = clinic.examine()
    assert failures(found) == {"runtime": "UNREACHABLE"}
    assert found.exit_status == 3
    assert [check.name for check in found.checks][-1] == "model"
    assert "FAIL runtime: no route to host" in found.as_text()
    found = clinic.examine(OFFLINE="?")
    assert (failures(found)["settings"], found.exit_status) == ("SETTING_INVALID", 2)
    usage = doctor.shutil.disk_usage("/")._replace(free=5_000_000)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage)
    found = clinic.examine()
    assert failures(found)["store"] == "DISK_NEARLY_FULL"
    assert found.exit_status == 6


def test_no_secret_is_on_the_page(clinic: Clinic) -> None:
    clinic.note = Note("UNVERIFIED", "https://h/x.tar.gz?sig=hf_secret is not pinned", "pin it")
    with hub.serving(hub.Hub(files={"m.gguf": b"GGUF"}, token="hf_secret")) as served:
        clinic.variables |= {"HF_TOKEN": "hf_secret", "HF_ENDPOINT": served.url}
        found = clinic.examine(GGUF_PATH="", GGUF_REPO_ID="me/model", GGUF_FILENAME="m.gguf")
    assert "hf_secret" not in found.as_text() + json.dumps(found.as_json())
    assert "https://h/x.tar.gz?… is not pinned" in found.as_text()
    assert "with token" in found.as_text()
    assert found.exit_status == 0
    assert served.tokens_seen == {"Bearer hf_secret"}


@pytest.mark.parametrize(
    ("repo", "name", "code", "setting"),
    [
        ("me/none", "m.gguf", "REPOSITORY_NOT_FOUND", "YAKULINGO_SPACES_GGUF_REPO_ID"),
        ("me/model", "x.gguf", "FILE_NOT_FOUND", "YAKULINGO_SPACES_GGUF_FILENAME"),
        ("me/model", "", "HUB_UNREACHABLE", ""),
        ("", "", "HUB_UNREACHABLE", ""),
        ("me/model", "m.gguf", "OFFLINE", "YAKULINGO_SPACES_OFFLINE=0"),
        ("me/model", "m.gguf", "MODEL_SHA256_MISMATCH", "YAKULINGO_SPACES_GGUF_SHA256"),
    ],
)
def test_the_hub_is_asked_for_a_model_that_is_not_here(
    clinic: Clinic, repo: str, name: str, code: str, setting: str
) -> None:
    with hub.serving(hub.Hub(files={"m.gguf": b"GGUF"})) as served:
        clinic.variables["HF_ENDPOINT"] = served.url if name else "http://127.0.0.1:9"
        offline = "1" if code == "OFFLINE" else "0"
        wanted = {"GGUF_REPO_ID": repo, "GGUF_FILENAME": name, "OFFLINE": offline}
        wanted["GGUF_SHA256"] = "0" * 64 if code.startswith("MODEL_") else ""
        found = clinic.examine(GGUF_PATH="", **wanted)
    assert failures(found) == {"model": code}
    assert found.exit_status == {"FOUND": 2, "MISMATCH": 4}.get(code.rpartition("_")[2], 3)
    assert setting in found.checks[-1].hint
    assert ("as no model is named" in found.checks[-1].detail) is (not repo)
    assert "cannot be served" in found.as_text()


def test_without_a_model_the_hubs_client_is_not_needed(
    clinic: Clinic, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    found = clinic.examine(GGUF_PATH="")
    assert failures(found) == {}
    verdict = "verdict: a model can be served here once --model PATH names one"
    assert found.as_text().endswith(verdict)
    named = {"GGUF_REPO_ID": "me/model", "GGUF_FILENAME": "m.gguf"}
    assert failures(clinic.examine(GGUF_PATH="", **named)) == {"model": "HUB_CLIENT_MISSING"}
    clinic.fault = LoaderError("UNREACHABLE", "no answer")
    verdict = "cannot be served here, whatever the model, until the FAIL lines are solved"
    assert clinic.examine(GGUF_PATH="").as_text().endswith(verdict)


def test_what_cannot_be_looked_at_is_a_finding(
    clinic: Clinic, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container whose user may not enter the folder of its HOME."""

    def refused(_: object) -> None:
        raise PermissionError(13, "Permission denied", "/root/.cache")

    monkeypatch.setattr(doctor.shutil, "disk_usage", refused)
    monkeypatch.setattr(doctor.host, "detect", refused)
    found = clinic.examine()
    assert failures(found) == {"gpu": "SYSTEM"}
    assert found.exit_status == 6
    assert "private temporary folder" in found.as_text()


def test_what_vouches_for_a_runtime_is_said(clinic: Clinic) -> None:
    for digest, words in (("0" * 64, "pinned"), ("", "digests match, not pinned")):
        checks = clinic.examine(LLAMA_CPP_MANIFEST_SHA256=digest).checks
        (runtime,) = (check for check in checks if check.name == "runtime")
        assert f", {words}, in " in runtime.detail
        assert "verified" not in runtime.detail


# What another machine would get, asked with no GPU present.


def test_what_is_missing_there_is_said_with_what_brings_it(tmp_path: Path) -> None:
    place, server = tmp_path / "manifest.json", artifact("cu130", "sm90", "90")
    place.write_bytes(dump(manifest(server, runtime("cu130"))))
    asked = load(environ={"HF_HOME": str(tmp_path)}, llama_cpp_manifest_url=place.as_uri())
    told = doctor.suppose("capability=90,driver=580,torch=none", asked, ignore).as_text()
    first, because, chosen, brought, verdict = told.splitlines()
    assert first == f"would fetch {server.name} of release b11549-1"
    assert "brought by cuda-runtime-13.0-cu130" in because
    assert chosen.startswith(f"  {server.name}: chosen")
    assert brought.startswith("  cuda-runtime-13.0-cu130")
    assert "fetched too: libraries; 400.0 MB" in brought
    assert verdict == "verdict: a model can be served on that machine"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        *((f"machine=x86_64,{one}", one) for one in ("12.0", "capability=hopper", "gpu=Voodoo 2")),
        *((f"machine=x86_64,{one}", one) for one in ("driver=new", "torch=12.8", "cpus=4")),
        *((text, "") for text in ("", "driver=580,", "driver=580,,glibc=2.36")),
        ("machine=x86_64,glibc=", "glibc="),
        (
            "gpu=NVIDIA H2000",
            "gpu=NVIDIA H2000' names a card that is unknown; the nearest known name is H200",
        ),
        ("driver=580,driver=570", "driver=570"),
        ("capability=90,gpu=NVIDIA H200", "gpu=NVIDIA H200"),
    ],
)
def test_what_cannot_be_read_or_is_said_twice_is_named(text: str, named: str) -> None:
    with pytest.raises(SettingError, match="--suppose") as caught:
        doctor.supposed_host(text)
    assert f"'{named}" in caught.value.message
    assert "capability=12.0" in caught.value.hint
