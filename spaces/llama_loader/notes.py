"""What a person is told of a server's start that succeeded, but not as it was asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_loader import server_plan
from llama_loader.events import Note
from llama_loader.gguf_header import ALL_LAYERS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from llama_loader.server import Server


def not_as_asked(server: Server) -> Iterator[Note]:
    """Return what people should know of a start that succeeded with less than was asked for.

    A model that is on none of its devices is ``MODEL_ON_CPU``, an error, unless the CPU is allowed.
    """
    plan, asked, report = server.plan, server.asked, server.report
    if not plan.repacked:
        yield Note(
            "CPU_NOT_REPACKED",
            "this CPU announces instructions (AMX, AVX-512) that it then refuses (SIGILL);"
            " llama-server was started anew without weights laid out for them (--no-repack), so"
            " prompts take longer on the CPU",
            "nothing is wrong on the GPU; otherwise choose another machine type",
        )
    if plan.devices != asked.devices:
        yield Note(
            "DEVICES_ADDED",
            f"{', '.join(asked.devices)} had no room for the model, although it was reckoned to"
            f" fit; it is on {', '.join(plan.devices)} now",
            "another program may use that GPU; to start on all at once, name them in"
            " YAKULINGO_SPACES_LLAMA_DEVICE",
        )
    own_layers = server_plan.last(plan.extra, "-ngl", "--gpu-layers", "--n-gpu-layers")
    all_asked = asked.n_gpu_layers >= ALL_LAYERS and own_layers is None
    if all_asked and report.offloaded and report.offloaded < (report.layers or 0):
        yield Note(
            "LAYERS_LEFT_OVER",
            f"{report.offloaded} of {report.layers} layers are on the GPU, although all were asked"
            " for; the CPU does the rest, and each token waits for it",
            "where the GPU has no room for all, take a smaller quantisation or model, or lower"
            " YAKULINGO_SPACES_N_CTX",
        )
    owners = report.owners(plan.devices)
    unused = [name for name in plan.devices if name not in owners]
    if owners and unused:
        yield Note(
            "DEVICE_UNUSED",
            f"{', '.join(unused)} got no part of the model, by llama-server's own report",
            "it is free for something else: leave it out of YAKULINGO_SPACES_LLAMA_DEVICE",
        )
    if plan.devices and plan.n_gpu_layers and not (report.told or plan.allow_cpu):
        yield Note(
            "DEVICES_NOT_CHECKED",
            f"whether the model is on {', '.join(plan.devices)} could not be checked: llama-server"
            " did not say where it put it, so this start proves nothing of the GPU",
            "leave out --log-disable and --log-verbosity after --; nvidia-smi shows what a GPU"
            " holds",
        )
