"""What a person is told of a server's start that succeeded, but not as it was asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llama_loader import server_plan
from llama_loader.events import Note
from llama_loader.gguf_header import ALL_LAYERS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime
    from pathlib import Path

    from llama_loader.server import Server


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


def channel_expires(url: str, expires: datetime, runs_until: datetime | None) -> Note:
    """A channel expires soon; or it has expired, and what was accepted ``runs_until`` then."""
    hint = "its author renews it by promoting a release again; is this machine's clock right?"
    if runs_until is None:
        told = f"channel {url} expires on {expires:%Y-%m-%d}"
        return Note("CHANNEL_EXPIRES_SOON", told, hint)
    told = (
        f"channel {url} expired on {expires:%Y-%m-%d}; the release that was accepted before runs"
        f" until {runs_until:%Y-%m-%d}"
    )
    return Note("CHANNEL_EXPIRED", told, hint)


def store_temporary(usual: Path, why: OSError, instead: Path) -> Note:
    """The usual store cannot be written, or others can change what is in it."""
    return Note(
        "STORE_TEMPORARY",
        f"{usual} cannot be used ({why.strerror}); installing to {instead}, "
        "which is gone with this machine's temporary files",
        "set HF_HOME or --store to a folder that this user, and no other, can write; a disk that"
        " all users can write is safe after `chmod +t` on its folder",
    )


def compared_with_receipt(place: Path) -> Note:
    """An installed runtime was hashed, and no manifest was given to compare it with."""
    return Note(
        "COMPARED_WITH_RECEIPT",
        f"{place} was compared with its own receipt, not with a manifest: a program that can change"
        " the files can change the receipt",
        "give the release's manifest with --manifest and --manifest-sha256",
    )


def modes_mended(place: Path, names: str) -> Note:
    """Files or folders of a runtime had modes that it does not give them."""
    return Note(
        "MODES_MENDED",
        f"{place}: the modes of {names} were wrong and were set right; the content is verified",
        "which program changed them? Copy a store with its modes (cp -a, rsync -p)",
    )


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
