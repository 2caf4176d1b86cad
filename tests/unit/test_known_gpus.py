"""GPUs by their names alone: those that the table of test_selection has no room for."""

from __future__ import annotations

import pytest

from llama_loader import known_gpus


@pytest.mark.parametrize(
    ("name", "capability"),
    [
        ("NVIDIA GeForce GTX 1630", "75"),
        ("NVIDIA GeForce MX450", "75"),
        ("Quadro T1000", "75"),
        ("Quadro T2000 with Max-Q Design", "75"),
        ("Tesla T10", "75"),
        ("NVIDIA T1000 8GB", "75"),
        ("NVIDIA A100X", "80"),
        ("NVIDIA A30X", "80"),
        ("NVIDIA CMP 170HX", "80"),
        ("GRID A100-40C", "80"),
        ("NVIDIA A10-24Q", "86"),
        ("NVIDIA L40G", "89"),
        ("NVIDIA RTX 4000 SFF Ada Generation", "89"),
        ("NVIDIA Thor", "110"),
        ("NVIDIA Jetson AGX Thor Developer Kit", "110"),
        ("NVIDIA RTX PRO 6000D", "120"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "120"),
        ("NVIDIA GB300", "103"),
        # not of NVIDIA, or not known
        ("AMD RTX 4090 lookalike", None),
        ("AMD Radeon RX 6600", None),
        ("Intel(R) Arc(TM) A380 Graphics", None),
        ("Intel Data Center GPU T4", None),
        ("Moore Threads L40", None),
        ("NVIDIA T10000", None),
        ("NVIDIA Thorium", None),
        ("", None),
    ],
)
def test_a_name_says_the_capability(name: str, capability: str | None) -> None:
    assert known_gpus.capability(name) == capability
