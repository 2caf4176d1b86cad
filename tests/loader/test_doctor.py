import json
import os
import struct
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest

from llama_loader import doctor, selection, self_test
from llama_loader.cuda_libraries import Library
from llama_loader.doctor import Examination
from llama_loader.errors import HostError, LoaderError, NetworkError, SettingError
from llama_loader.events import Note, Sink, Timeline, ignore
from llama_loader.gpus import Gpu
from llama_loader.host import HostFacts
from llama_loader.loader import Prepared
from llama_loader.manifest import Manifest, dump
from llama_loader.settings import Settings, load
from tests.loader.test_selection import GPUS, short
from tests.loader.test_selection import RELEASE as FULL
from tests.rigs import hub
from tests.rigs.impostor_archive import Impostor
from tests.rigs.releases import BARE, Unlisted, artifact, libraries, manifest, runtime

H200 = replace(
    BARE,
    gpus=(Gpu("NVIDIA H200", "90", 150_000_000_000),),
    driver="580.159",
    gpu_source="nvml",
    libraries=libraries(13),
)
RELEASE = manifest(
    artifact("cu130", "sm90", "90"), artifact("cu130", "sm120", "120a"), artifact("cpu", "cpu")
)
LIST = {"text": "Available devices:\n  CUDA0: NVIDIA H200 (143155 MiB, 142629 MiB free)\n"}


MMPROJ = b"GGUF" + struct.pack("<IQQQ20sIQ4s", 3, 0, 1, 20, b"general.architecture", 8, 4, b"clip")


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
        installed = Unlisted(place, place, "0" * 64, "b1", choice.artifact)
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
    found = clinic.examine()
    assert (found.exit_status, failures(found)) == (0, {})
    page = found.as_text()
    for words in (
        "NVIDIA H200, compute capability 9.0, 150 GB",
        "driver: 580.159",
        "libcublas.so.13 ? in /cu13 (site-packages)",
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


@pytest.mark.parametrize("there", [(), libraries(12)])
def test_missing_libraries_name_the_packages(clinic: Clinic, there: tuple[Library, ...]) -> None:
    clinic.host = replace(H200, libraries=there)
    found = clinic.examine()
    assert failures(found) == {"libraries": "CUDA_LIBRARY_MISSING"}
    assert found.exit_status == HostError.exit_status
    assert "hint: add to requirements.txt (or pip install): nvidia-cublas" in found.as_text()


@pytest.mark.parametrize(
    ("listing", "code", "hint"),
    [
        ({"text": "Available devices:\n  (none)\n"}, "NO_DEVICE", "no GPU is visible"),
        (LIST, "INVALID_DEVICE", "YAKULINGO_SPACES_LLAMA_DEVICE=auto"),
        ({"text": "what?"}, "DEVICE_LIST_GARBLED", "really a llama-server"),
        ({"status": 1, "text": "version `GLIBC_2.38' not found"}, "GLIBC_TOO_OLD", ""),
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


def test_a_runtime_that_lists_a_device_but_does_not_compute(
    clinic: Clinic, impostor: Impostor
) -> None:
    impostor.behave(list=LIST, completion="die")
    found = clinic.examine()
    assert failures(found) == {"test run": "CUDA_ERROR"}
    assert found.exit_status == 7
    assert "your model is not the cause" in found.as_text()
    assert impostor.starts() == 2


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
    usage = doctor.shutil.disk_usage("/")._replace(free=5_000_000)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage)
    found = clinic.examine()
    assert failures(found)["store"] == "DISK_NEARLY_FULL"
    assert found.exit_status == 6


def test_offline_a_model_of_the_hub_must_be_here_already(clinic: Clinic) -> None:
    clinic.variables |= {"YAKULINGO_SPACES_OFFLINE": "1"}
    found = clinic.examine(GGUF_PATH="")
    assert failures(found) == {"model": "OFFLINE"}
    assert found.exit_status == 3
    assert "YAKULINGO_SPACES_OFFLINE=0" in found.checks[-1].hint
    assert clinic.examine(GGUF_PATH=str(self_test.MODEL)).exit_status == 0


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
    ],
)
def test_the_hub_is_asked_for_a_model_that_is_not_here(
    clinic: Clinic, repo: str, name: str, code: str, setting: str
) -> None:
    with hub.serving(hub.Hub(files={"m.gguf": b"GGUF"})) as served:
        clinic.variables["HF_ENDPOINT"] = served.url if name else "http://127.0.0.1:9"
        found = clinic.examine(GGUF_PATH="", GGUF_REPO_ID=repo, GGUF_FILENAME=name)
    assert failures(found) == {"model": code}
    assert found.exit_status == (2 if name else 3)
    assert setting in found.checks[-1].hint
    assert "cannot be served" in found.as_text()


@pytest.mark.parametrize(
    ("name", "data", "code"),
    [
        ("page.gguf", b"<!doctype html><html>", "MODEL_NOT_GGUF"),
        ("empty.gguf", b"", "MODEL_NOT_GGUF"),
        ("cut.gguf", self_test.MODEL.read_bytes()[:100], "MODEL_NOT_GGUF"),
        ("m-00001-of-00003.gguf", self_test.MODEL.read_bytes(), "MODEL_INCOMPLETE"),
        ("m-00002-of-00003.gguf", self_test.MODEL.read_bytes(), "MODEL_INCOMPLETE"),
        ("mmproj.gguf", MMPROJ, "MODEL_PROJECTOR"),
        ("none.gguf", None, "MODEL_MISSING"),
    ],
)
def test_a_file_that_is_no_whole_model_is_found(
    clinic: Clinic, tmp_path: Path, name: str, data: bytes | None, code: str
) -> None:
    if data is not None:
        (tmp_path / name).write_bytes(data)
    found = clinic.examine(GGUF_PATH=str(tmp_path / name))
    assert failures(found)["model"] == code
    assert found.exit_status == 2
    assert name in found.checks[-1].detail
    for number in (1, 2):  # all parts of a model are a model
        (tmp_path / f"p-0000{number}-of-00002.gguf").write_bytes(self_test.MODEL.read_bytes())
    assert clinic.examine(GGUF_PATH=str(tmp_path / "p-00001-of-00002.gguf")).exit_status == 0


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


def test_foreign_text_forges_no_line_of_the_page(clinic: Clinic, tmp_path: Path) -> None:
    forged = "\x1b[2J\u2028\x85\r\nverdict: a model can be served here now\u202e\x9b31m"
    clinic.host = replace(H200, gpus=(Gpu(f"NVIDIA {forged}", "90", None),), driver=forged)
    clinic.note = Note("UNVERIFIED", forged, forged)
    clinic.fault = NetworkError("UNREACHABLE", forged, hint=forged)
    found = clinic.examine(GGUF_PATH=str(tmp_path / f"m{forged}.gguf"))
    page = found.as_text()
    assert page.count("\nverdict: ") == 1
    assert page.splitlines()[-1] == "verdict: a model cannot be served here now"
    assert all(line.isprintable() for line in page.split("\n"))
    told = json.dumps(found.as_json())
    assert told.isascii()
    assert told.isprintable()


def test_what_vouches_for_a_runtime_is_said(clinic: Clinic) -> None:
    for digest, words in (("0" * 64, "pinned"), ("", "digests match an unpinned manifest")):
        checks = clinic.examine(LLAMA_CPP_MANIFEST_SHA256=digest).checks
        (runtime,) = (check for check in checks if check.name == "runtime")
        assert f", {words}, in " in runtime.detail
        assert "verified" not in runtime.detail


# What another machine would get, asked with no GPU present.

QUESTION = "capability=12.0,driver=580,glibc=2.36,torch=cu128"


def test_the_question_of_a_space_on_zerogpu(tmp_path: Path) -> None:
    facts = doctor.supposed_host(QUESTION)
    assert facts.capabilities == ("120",)
    chosen = selection.select(FULL, facts)
    assert short(chosen.artifact.name) == "cu128-sm120"
    assert chosen.missing == ()
    lines = supposed(QUESTION, FULL, tmp_path)
    assert lines[0] == f"would fetch {chosen.artifact.name} of release b11549-1"
    assert len(lines) == 3 + len(FULL.artifacts)


def supposed(text: str, release: Manifest, folder: Path) -> list[str]:
    place = folder / "manifest.json"
    place.write_bytes(dump(release))
    asked = load(environ={"HF_HOME": str(folder)}, llama_cpp_manifest_url=place.as_uri())
    return doctor.suppose(text, asked, ignore).as_text().splitlines()


@pytest.mark.parametrize(("name", "capability", "with_12", "with_13"), GPUS)
def test_every_gpu_by_its_name(name: str, capability: str, with_12: str, with_13: str) -> None:
    for torch, driver, expected in (("cu128", "570", with_12), ("cu130", "580", with_13)):
        for who in (f"gpu={name}", f"capability={capability}") if expected else ():
            facts = doctor.supposed_host(f"{who},driver={driver},glibc=2.36,torch={torch}")
            assert short(selection.select(FULL, facts).artifact.name) == expected


def test_what_is_missing_there_is_said_with_what_brings_it(tmp_path: Path) -> None:
    asked = "capability=90,driver=580,torch=none"
    facts = doctor.supposed_host(asked)
    chosen = selection.select(FULL, facts)
    with pytest.raises(HostError) as caught:
        selection.require_libraries(chosen, facts)
    assert "pip install): nvidia-cublas" in caught.value.hint
    because = supposed(asked, FULL, tmp_path)[1]
    assert "libcublas.so.13, libcublasLt.so.13, libcudart.so.13 missing here" in because
    bringing = manifest(artifact("cu130", "sm90", "90"), runtime("cu130"))
    chosen = selection.select(bringing, facts)
    because, server, brought, verdict = supposed(asked, bringing, tmp_path)[1:]
    assert "brought by cuda-runtime-13.0-cu130" in because
    assert server.startswith(f"  {chosen.artifact.name}: chosen")
    assert brought.startswith("  cuda-runtime-13.0-cu130")
    assert "fetched too: libraries; 400.0 MB" in brought
    assert verdict == "verdict: a model can be served on that machine"


def test_an_old_system_there_is_an_error_here() -> None:
    with pytest.raises(HostError, match=r"2\.31"):
        selection.select(FULL, doctor.supposed_host("capability=90,glibc=2.31,torch=cu130"))
    with pytest.raises(HostError, match=r"driver 525\.60, that machine has 470\.999"):
        selection.select(FULL, doctor.supposed_host("capability=7.5,driver=470"))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        *((f"machine=x86_64,{one}", one) for one in ("12.0", "capability=hopper", "gpu=Voodoo 2")),
        *((f"machine=x86_64,{one}", one) for one in ("driver=new", "torch=12.8", "cpus=4")),
        *((text, "") for text in ("", "driver=580,", "driver=580,,glibc=2.36")),
        ("machine=x86_64,glibc=", "glibc="),
        ("driver=580,driver=570", "driver=570"),
        ("capability=90,gpu=NVIDIA H200", "gpu=NVIDIA H200"),
    ],
)
def test_what_cannot_be_read_or_is_said_twice_is_named(text: str, named: str) -> None:
    with pytest.raises(SettingError, match="--suppose") as caught:
        doctor.supposed_host(text)
    assert repr(named) in caught.value.message
    assert "capability=12.0" in caught.value.hint
