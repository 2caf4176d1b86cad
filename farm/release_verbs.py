"""The verbs of a release: publish, promote, deploy, build again. `tasks.py` imports them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

from farm import options
from farm.options import (
    BuildRequest,
    Days,
    Deploy,
    Only,
    Promoting,
    RebuildRequest,
    Sha256,
    Wish,
)
from farm.terminal import show
from farm.terminal.cli import verb


@verb
def publish(
    _: object,
    to: str | None = None,
    folder: Path = Path("dist"),
    channel: str | None = None,
    dry_run: bool = False,
    key: Path | None = None,
) -> None:
    """Send a release to its place, the manifest last; files that it has are not sent again.

    Args:
        to: a folder, github:OWNER/REPO or hf:OWNER/REPO
        folder: a release folder
        channel: also promote it to this channel
        dry_run: show what would be sent, and end
        key: for --channel: the file with the signing key, else FARM_SIGNING_KEY
    """
    from farm import own_space, trust
    from farm.publish import gate as checking
    from farm.publish import places

    place = places.parse(to)
    wanted = None if channel is None else places.require_name("channel", channel)
    signer = None if wanted is None or dry_run else trust.signer(key)
    checked = None
    if signer is not None:
        report = checking.run(folder, show.check, start=False)
        report.require_passed()
        checked = report.manifest_sha256
        show.not_started(f"--folder {folder}")
    plan = own_space.publish(folder, place, dry_run=dry_run)
    if wanted is not None and signer is not None:
        from farm.publish import channels

        own = channels.Channel(place, wanted, signer)
        show.promotion(own.promote(plan.release, checked=checked))


@verb
def gate(
    _: object, folder: Path | None = None, to: str | None = None, release: str | None = None
) -> None:
    """Run the checks that a promotion demands, and print the digest of what passed.

    Args:
        folder: a release folder, dist if none is given
        to: instead of a folder: where the release is published
        release: for --to: its name, e.g. b11549-1
    """
    from farm.publish import gate as checking
    from farm.publish import places

    if folder is not None:
        options.one_of(
            {"--folder": str(folder)}, {"--folder": ()}, {"--to": to, "--release": release}
        )
    if to is None and release is None:
        report = checking.run(folder or Path("dist"), show.check)
    else:
        place = places.parse(to)
        name = places.require_given("release", release, place)
        report = checking.check_published(place, name, show.check)
    show.gate(report, to)


@verb
def promote(
    _: object,
    release: str,
    asked: Promoting,
    serial: int = 1,
    sha256: Sha256 = None,
) -> None:
    """Make a published release the current one of a channel, with the next serial; signs it.

    Args:
        release: its name, e.g. b11549-1
        asked: the channel
        serial: the lowest to give, where the place has lost those that it gave before
        sha256: of the manifest that `invoke gate` passed; without it, it is read here, not started
    """
    from farm.publish import channels, places
    from farm.publish import gate as checking

    name = places.require_name("release", release)
    own = channels.of(asked)
    checked = checking.require_gate(own.place, name, show.check, checked=sha256)
    if sha256 is None:
        show.not_started(f"--to {own.place.where} --release {name}")
    show.promotion(own.promote(name, days=asked.days, at_least=serial, checked=checked))


@verb
def rollback(_: object, asked: Promoting) -> None:
    """Make the previous release of a channel current again, with a higher serial."""
    from farm.publish import channels

    show.promotion(channels.of(asked).rollback(days=asked.days))


@verb
def renew(
    _: object,
    asked: Promoting,
    within: Days = 30,
    sha256: str | None = None,
    dry_run: bool = False,
) -> None:
    """Sign channels that end soon again, or one of them: the same release, a higher serial.

    A channel that cannot be renewed is an error after all others were.

    Args:
        asked: the channels
        within: days; a channel that ends later is left as it is
        sha256: NAME=HEX … of the channels to renew, as --dry-run printed them; no other is signed
        dry_run: print the channels that end soon with their digests, and end; needs no key
    """
    from farm import trust
    from farm.errors import FarmError, raise_all
    from farm.publish import channels, places

    place, named = places.parse(asked.to), places.project(asked.project)
    due, failed = channels.due(place, within, asked.channel)
    for name, current in due.items():
        show.note(f"channel {name} names {current.release}, serial {current.serial}")
    if not due:
        raise_all(failed)
        show.note(f"no channel of {place.where} ends within {within} days: nothing to renew")
        return
    if dry_run:
        for error in failed:  # the others can be renewed: the next call raises them
            show.note(error.line)
        show.line(" ".join(f"{name}={current.sha256}" for name, current in due.items()))
        return
    signer = trust.signer(asked.key)
    approved = None if sha256 is None else sha256.split()
    for name, current in due.items():
        try:
            if approved is not None and f"{name}={current.sha256}" not in approved:
                raise channels.not_approved(place, name, current.sha256)
            own = channels.Channel(place, name, signer, named)
            show.promotion(own.renew(days=asked.days, checked=current.sha256))
        except FarmError as error:
            failed.append(error)
    raise_all(failed)


@verb
def keygen(_: object, out: Path = Path("farm-signing.key")) -> None:
    """Make a pair of minisign keys for channels, and print the public one.

    Args:
        out: the secret key's file; the public one gets .pub behind its name
    """
    from farm import trust

    public = trust.generate(out)
    show.line(f"secret key: {out} (keep it; FARM_SIGNING_KEY takes its text)")
    show.line(f"public key: {public}")


@verb
def pin_space(
    _: object,
    manifest: str | None = None,
    to: str | None = None,
    release: str | None = None,
    channel: str | None = None,
    public_key: str | None = None,
    project: str | None = None,
    url: str | None = None,
    suppose: str | None = None,
    allow_cpu: bool = False,
) -> None:
    """Write spaces/release.json, which names a release or a channel; or pin an archive's URL.

    Args:
        manifest: a manifest's URL
        to: where it is published, instead of --manifest
        release: the release there to pin
        channel: the channel there to follow, instead of --release
        public_key: for --channel: the key that must have signed it (RW…)
        project: for --channel: OWNER/REPO that it is signed for; the place's own if not given
        url: instead of a release: any CUDA archive of llama.cpp, pinned by its digest
        suppose: for --url: the host to check it for, instead of ZeroGPU
        allow_cpu: for --url: the host may have no GPU
    """
    from farm import own_space, trust
    from farm.publish import pin_space as pins_of
    from farm.publish import places

    ways = {"--manifest": manifest, "--release": release, "--channel": channel, "--url": url}
    beside = {"--to": to, "--public-key": public_key, "--project": project, "--suppose": suppose}
    beside["--allow-cpu"] = "1" if allow_cpu else None
    options.one_of(ways, pins_of.BESIDE, beside)
    if url is not None:
        hosts = (suppose,) if suppose else own_space.ZEROGPU
        show.archive(pins_of.archive(url, hosts, ("--allow-cpu",) if allow_cpu else ()))
        return
    if manifest is not None:
        pin = pins_of.url(manifest)
    elif release is not None:
        pin = pins_of.release(places.parse(to), places.require_name("release", release))
    else:
        name = places.require_name("channel", channel)
        key = trust.require_public(options.given("--public-key", public_key or ""))
        named = places.project(project)
        pin = pins_of.channel(places.parse(to), name, key, named)
    pins_of.write(pin.content)
    show.pin(pin, pins_of.FILE)


@verb
def deploy_space(_: object, space: Deploy) -> None:
    """Upload spaces/ alone to a Space on the Hub, and set its variables and hardware."""
    from farm import own_space
    from farm.publish import deploy_space as deploying

    wanted = deploying.hardware(space.hardware)
    for warning in deploying.plan(space).unknown():
        show.note(warning)
    deployment = deploying.plan(replace(space, model=deploying.found_model(space.model)))
    changes = deploying.compare(deployment, adopt=space.adopt)
    show.deployment(changes, wanted)
    if deployment.pins:
        named = (wanted.value if wanted else changes.hardware) or deploying.HARDWARE.value
        own_space.require_pin_runs(replace(space, hardware=named), show.line)
    if not space.dry_run:
        show.line(deploying.deploy(changes, hardware=wanted))


@verb
def space(
    _: object,
    to: Deploy,
    wish: Wish,
    build: Annotated[
        BuildRequest, Only("line", "engine", "image", "source", "assume_build", "patches")
    ],
) -> None:
    """Make a Space that answers: build what it needs, publish, deploy. A second run resumes."""
    from farm import own_space
    from farm.terminal.progress import BuildReport

    with BuildReport() as report:
        own_space.make(replace(wish, **vars(to), build=build), report)


@verb
def reproducible(
    _: object,
    build: Annotated[
        BuildRequest,
        Only("line", "image", "toolkit", "source", "jobs", "patches", arch_set="cpu",
             engine="docker"),
    ],
) -> None:  # fmt: skip
    """Build a set twice from nothing, in two containers, and compare every byte."""
    from farm.reproduce import prove
    from farm.terminal.progress import BuildReport

    line = build.line or ("cpu" if build.arch_set == "cpu" else None)
    with BuildReport() as report:
        prove(replace(build, line=line, fresh=True), report)


@verb
def rebuild(_: object, asked: RebuildRequest) -> None:
    """Build a published tarball again from its BUILD.json, and print whether it is identical."""
    from farm.reproduce import rebuild as build_again
    from farm.terminal.progress import BuildReport

    with BuildReport() as report:
        build_again(asked, report)
