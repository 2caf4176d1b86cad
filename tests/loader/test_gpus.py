"""GPUs by their names, and which of them CUDA_VISIBLE_DEVICES leaves to a program."""

from dataclasses import replace
from pathlib import Path

import pytest

from llama_loader import gpus, host
from llama_loader.errors import HostError
from llama_loader.gpus import Gpu
from llama_loader.manifest import Manifest
from llama_loader.selection import select
from llama_loader.settings import load
from tests.loader.test_selection import short
from tests.rigs.refusals import refused
from tests.rigs.releases import BARE, artifact, libraries, manifest

A100 = Gpu("NVIDIA A100", "80", 80 << 30, "GPU-aa11")
T4 = Gpu("Tesla T4", "75", 16 << 30, "GPU-ab22")
L4 = Gpu("NVIDIA L4", "89", 24 << 30, "GPU-cc33")
THREE = replace(
    BARE, gpus=(A100, T4, L4), driver="580.159", gpu_source="nvml", libraries=libraries(12, 13)
)
SINGLES = manifest(
    *(artifact("cu130", f"sm{a}", a, size=int(a) * 100_000) for a in ("75", "80", "86", "89"))
)


SEEN: dict[tuple[Gpu, ...], list[str | None]] = {
    (A100, T4, L4): [
        None,
        # of which GPU a MIG device is, only the driver knows
        *("MIG-5c89a7b2-0000", "MIG-GPU-ab22/1/0", "MIG-GPU-ab22/1/0,MIG-GPU-ab22/2/0"),
    ],
    (A100,): ["0", "GPU-aa11", "GPU-aa", "GPU-aa11,1"],
    (T4,): ["00001", "+1", "1,3,0", "1,-1,0", "1,none,0", "1,,0", "1,GPU-aa11"],
    (T4, A100): [" 1 , 0"],
    (T4, L4): ["1gpu2,2ampere"],
    (L4,): ["GPU-cc,GPU-a,GPU-aa11"],
    (L4, T4): ["GPU-cc33,GPU-ab"],
    (L4, T4, A100): ["2,1,0"],
    (): [
        *("", " ", "-1", "NoDevFiles", "9" * 5000, "0,0", "0,1,0", "gpu-aa11"),
        "９",  # noqa: RUF001 - a digit, but not one of strtoul's
        *("GPU-a", "GPU-ff,GPU-aa11", "GPU-aa11,GPU-aa"),  # two begin so
    ],
}


@pytest.mark.parametrize(
    ("named", "expected"), [(named, seen) for seen, every in SEEN.items() for named in every]
)
def test_what_a_program_sees(named: str | None, expected: tuple[Gpu, ...]) -> None:
    facts = replace(THREE, visible_devices=named)
    assert facts.visible == expected
    assert facts.capabilities == tuple(gpu.capability for gpu in expected)
    entries = str(named).split(",")
    assert facts.visible_count == len(entries if entries[0].startswith("MIG-") else expected)


@pytest.mark.parametrize(
    ("order", "named", "expected"),
    [
        ("PCI_BUS_ID", "1", (T4,)),
        ("FASTEST_FIRST", "1", (A100, T4, L4)),
        ("nonsense", "1", (A100, T4, L4)),
        ("FASTEST_FIRST", "GPU-ab22", (T4,)),
        ("FASTEST_FIRST", "", ()),
    ],
)
def test_indices_count_in_another_order_only_where_that_is_known(
    order: str, named: str, expected: tuple[Gpu, ...]
) -> None:
    facts = replace(THREE, visible_devices=named, device_order=order)
    assert facts.visible == expected
    assert facts.visible_count == len(named.split(",")) if named else not facts.visible_count


@pytest.mark.parametrize("named", ["GPU-aa11", "MIG-GPU-aa11/1/0"])
def test_a_uuid_among_gpus_that_tell_none_is_not_known(named: str) -> None:
    facts = replace(THREE, gpus=(T4, replace(L4, uuid=None)), visible_devices=named)
    assert (facts.visible, facts.visible_count) == (facts.gpus, 1)


@pytest.mark.parametrize("source", ["zerogpu", "/proc/driver/nvidia"])
def test_a_gpu_that_zerogpu_will_attach_is_not_hidden_yet(source: str) -> None:
    facts = replace(THREE, gpus=(L4,), gpu_source=source, zerogpu=True, visible_devices="")
    assert (facts.visible, facts.visible_count) == ((L4,), 1)
    assert not replace(facts, gpu_source="nvml").visible


def test_variables_are_facts_and_a_uuid_that_the_driver_has_not_read_yet_is_none(
    tmp_path: Path,
) -> None:
    file = tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0/information"
    file.parent.mkdir(parents=True)
    file.write_text("Model: \t Tesla T4\nGPU UUID: \t GPU-????????-????-????-????-????????????\n")
    environ = {"CUDA_VISIBLE_DEVICES": "1", "CUDA_DEVICE_ORDER": "FASTEST_FIRST"}
    facts = host.detect(load(environ=environ), root=tmp_path)
    assert facts.gpus == (Gpu("Tesla T4", "75"),)
    assert (facts.visible_devices, facts.device_order) == ("1", "FASTEST_FIRST")


FAT = manifest(
    artifact("cu124", "seed", "80 86 89 90", "80 86 89 90", size=130_000_000),
    artifact("cu128", "sm90", "90"),
    artifact("cu128", "sm120", "120a"),
)
BOTH = (Gpu("NVIDIA H200", "90", 141 << 30), Gpu("NVIDIA GeForce RTX 5090", "120", 32 << 30))


@pytest.mark.parametrize(
    ("release", "gpus", "named", "expected"),
    [
        (SINGLES, (A100, T4, L4), "0", "cu130-sm80"),
        (SINGLES, (A100, T4, L4), "1", "cu130-sm75"),
        (SINGLES, (A100, T4, L4), "2", "cu130-sm89"),
        (SINGLES, (A100, T4, L4), "GPU-ab22", "cu130-sm75"),
        (SINGLES, (A100, T4, L4), "1,0", "cu130-sm80"),
        # a hidden GPU asks for no fat set
        (FAT, BOTH, "0", "cu128-sm90"),
        (FAT, BOTH, "1", "cu128-sm120"),
        (FAT, BOTH, None, "cu124-seed"),
        # where nothing serves all, the most memory counts; the number where one's is unknown
        (SINGLES, (A100, T4), None, "cu130-sm80"),
        (SINGLES, (A100, *(T4,) * 6), None, "cu130-sm75"),
        (SINGLES, (replace(A100, memory=None), T4, T4), None, "cu130-sm75"),
    ],
)
def test_the_choice_is_for_the_visible_gpus_with_the_most_memory(
    release: Manifest, gpus: tuple[Gpu, ...], named: str | None, expected: str
) -> None:
    choice = select(release, replace(THREE, gpus=gpus, visible_devices=named))
    assert short(choice.artifact.name) == expected
    assert choice.native == (expected != "cu124-seed")


def test_all_hidden_is_said_as_such() -> None:
    facts = replace(THREE, visible_devices="7")
    with refused("NO_GPU", HostError, "CUDA_VISIBLE_DEVICES='7' hides all: NVIDIA A100"):
        select(SINGLES, facts)
    assert short(select(SINGLES, facts, arch="75").artifact.name) == "cu130-sm75"


NAMES: dict[str | None, list[str]] = {
    "75": [
        *("Tesla T4", "NVIDIA GeForce RTX 2080 Ti", "NVIDIA GeForce GTX 1660 SUPER"),
        *("NVIDIA TITAN RTX", "Quadro RTX 8000", "NVIDIA GeForce GTX 1630", "Quadro T1000"),
        *("NVIDIA GeForce MX450", "Tesla T10", "Quadro T2000 with Max-Q Design"),
        "NVIDIA T1000 8GB",
    ],
    "80": [
        *("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe", "NVIDIA A30", "NVIDIA A100X"),
        *("NVIDIA A30X", "NVIDIA CMP 170HX", "GRID A100-40C"),
    ],
    "86": [
        *("NVIDIA A10G", "NVIDIA A10", "NVIDIA A40", "NVIDIA RTX A6000", "NVIDIA A10-24Q"),
        *("NVIDIA GeForce RTX 3090", "NVIDIA GeForce RTX 3060 Laptop GPU"),
    ],
    "87": ["Orin"],
    "89": [
        *("NVIDIA L4", "NVIDIA L40S", "NVIDIA RTX 6000 Ada Generation", "NVIDIA L40G"),
        *("NVIDIA GeForce RTX 4090", "NVIDIA RTX 4000 SFF Ada Generation"),
    ],
    "90": ["NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA H20", "NVIDIA GH200 480GB"],
    "100": ["NVIDIA B200", "NVIDIA GB200"],
    "103": ["NVIDIA B300 SXM6 AC", "NVIDIA GB300"],
    "110": ["NVIDIA Thor", "NVIDIA Jetson AGX Thor Developer Kit"],
    "120": [
        *("NVIDIA RTX PRO 6000 Blackwell Server Edition", "NVIDIA RTX PRO 4500 Blackwell"),
        *("NVIDIA GeForce RTX 5090", "NVIDIA GeForce RTX 5060 Ti", "NVIDIA RTX PRO 6000D"),
        *("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", gpus.ZEROGPU.name),
    ],
    "121": ["NVIDIA GB10"],
    # not of NVIDIA, or not known
    None: [
        *("AMD Radeon RX 6600", "Intel(R) Arc(TM) A380 Graphics", "NVIDIA T10000"),
        *("NVIDIA Thorium", ""),
    ],
}


@pytest.mark.parametrize("capability", NAMES)
def test_a_name_says_the_capability(capability: str | None) -> None:
    assert {gpus.capability(name) for name in NAMES[capability]} == {capability}
    assert gpus.ZEROGPU.capability == "120"
