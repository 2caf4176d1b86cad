"""What a person is told where something is not as asked: each with what to do about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_loader import server_plan
from llama_loader.events import Note
from llama_loader.settings import ALL_LAYERS

if TYPE_CHECKING:
    from pathlib import Path

    from llama_loader.server import Server
    from llama_loader.server_log import LoadReport


def archive_not_pinned(url: str, digest: str) -> Note:
    """Nothing says which bytes the archive must have."""
    return Note(
        "UNVERIFIED",
        f"{url} is not pinned: these bytes are run as they came; their sha256 is {digest}",
        f"set YAKULINGO_SPACES_LLAMA_CPP_SHA256={digest}",
    )


def manifest_not_pinned(url: str, digest: str) -> Note:
    """Nothing says which bytes the manifest must have."""
    return Note(
        "MANIFEST_NOT_PINNED",
        f"manifest {url} is not pinned; its sha256 is {digest}",
        f"set YAKULINGO_SPACES_LLAMA_CPP_MANIFEST_SHA256={digest}",
    )


def channel_out_of_reach(url: str, serial: int, why: str) -> Note:
    """A channel cannot be asked; the last release accepted from it is used."""
    return Note(
        "CHANNEL_OUT_OF_REACH",
        f"channel {url} cannot be asked ({why}); going on with serial {serial}, which was"
        " accepted before",
        "it is asked again at the next start",
    )


def store_temporary(usual: Path, why: OSError, instead: Path) -> Note:
    """The usual store cannot be written."""
    return Note(
        "STORE_TEMPORARY",
        f"{usual} cannot be written ({why.strerror}); installing to {instead}, "
        "which is gone with this machine's temporary files",
        "set HF_HOME or --store to a folder that can be written",
    )


def partial_not_kept(place: Path, why: OSError) -> Note:
    """What came of a download cannot outlive this process."""
    return Note(
        "PARTIAL_NOT_KEPT",
        f"{place}: {why.strerror or why}: if this download is cut off, the next one begins anew",
    )


def previous_release(release: str) -> Note:
    """A person asked for the release before the one that is pinned or promoted."""
    return Note(
        "PREVIOUS_RELEASE",
        f"going back to {release}, which was used here before; nothing else was asked",
        "to stay with it, pin it: leave --previous away once the pin or channel names it",
    )


def layers_left_over(report: LoadReport) -> Note:
    """All layers were to be on the GPU, and did not fit."""
    there = f"{report.offloaded} of {report.layers}" if report.layers else "not all"
    return Note(
        "LAYERS_LEFT_OVER",
        f"{there} layers are on the GPU: it has no room for all; the CPU does the rest, and each"
        " token waits for it",
        "take a smaller quantisation or model, or lower YAKULINGO_SPACES_N_CTX",
    )


def devices_added(asked: tuple[str, ...], names: tuple[str, ...]) -> Note:
    """The model took more memory than was reckoned, and other GPUs were there."""
    return Note(
        "DEVICES_ADDED",
        f"{', '.join(asked)} had no room for the model, although it was reckoned to fit; it is on"
        f" {', '.join(names)} now",
        "somebody else may use that GPU; to start on all at once, name them in"
        " YAKULINGO_SPACES_LLAMA_DEVICE",
    )


def not_repacked() -> Note:
    """The CPU announces instructions that it does not have, as some virtual machines do."""
    return Note(
        "CPU_NOT_REPACKED",
        "this CPU announces instructions (AMX, AVX-512) that it then refuses (SIGILL); llama-server"
        " was started anew without weights laid out for them (--no-repack), so prompts take longer"
        " on the CPU",
        "nothing is wrong on the GPU; otherwise choose another machine type",
    )


def layers_on_cpu(report: LoadReport) -> Note:
    """All layers were asked to be on the GPU, none was to be left, and yet some are."""
    return Note(
        "LAYERS_ON_CPU",
        f"{report.offloaded} of {report.layers} layers are on the GPU, although all were asked for;"
        " the CPU does the rest, and each token waits for it",
        "look at the arguments after --; without any, report it with llama-server's log",
    )


def device_unused(names: tuple[str, ...]) -> Note:
    """Several devices were meant, and some got nothing."""
    return Note(
        "DEVICE_UNUSED",
        f"{', '.join(names)} got no part of the model, by llama-server's own report",
        "it is free for something else: leave it out of YAKULINGO_SPACES_LLAMA_DEVICE",
    )


def devices_not_checked(names: tuple[str, ...]) -> Note:
    """The server did not say where its weights are."""
    return Note(
        "DEVICES_NOT_CHECKED",
        f"whether the model is on {', '.join(names)} could not be checked: llama-server did not say"
        " where it put it, so this start proves nothing of the GPU",
        "leave away --log-disable and --log-verbosity after --; nvidia-smi shows what a GPU holds",
    )


def placement(server: Server) -> tuple[Note, ...]:
    """Return what the server's own report says against the devices that were meant.

    A model that is on none of them is ``MODEL_ON_CPU``, an error, unless the CPU is allowed.
    """
    plan, report = server.plan, server.report
    if not plan.devices or plan.n_gpu_layers == 0:
        return ()
    if not report.told:
        return () if plan.allow_cpu else (devices_not_checked(plan.devices),)
    found = []
    owners = report.owners(plan.devices)
    unused = tuple(name for name in plan.devices if name not in owners)
    if owners and unused:
        found.append(device_unused(unused))
    if report.offloaded and report.offloaded < (report.layers or 0) and _all_layers(server):
        found.append(layers_on_cpu(report))
    return tuple(found)


def _all_layers(server: Server) -> bool:
    """Whether every layer was to be on a GPU, and nobody said another number after ``--``."""
    plan = server.plan
    own = server_plan.last(plan.extra, "-ngl", "--gpu-layers", "--n-gpu-layers")
    return plan.n_gpu_layers >= ALL_LAYERS and not plan.fitted and own is None


def not_as_asked(server: Server) -> tuple[Note, ...]:
    """Return all that people should know of a start that came to its end."""
    return (*given_up(server), *placement(server))


def given_up(server: Server) -> tuple[Note, ...]:
    """Return what a start had to do without, for people to know; empty where it went as asked."""
    found = []
    if not server.plan.repacked:
        found.append(not_repacked())
    if server.plan.devices != server.asked.devices:
        found.append(devices_added(server.asked.devices, server.plan.devices))
    if server.plan.fitted:
        found.append(layers_left_over(server.report))
    return tuple(found)
