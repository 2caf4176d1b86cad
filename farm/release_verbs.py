"""The verbs of a release: publish, promote, deploy, build again. `tasks.py` imports them."""

from __future__ import annotations

from pathlib import Path

from invoke.context import Context  # noqa: TC002 - invoke reads the annotation

from farm.terminal import show
from farm.terminal.cli import task, verb

_MODEL_HELP = (
    "4b, 12b or 27b of TranslateGemma, OWNER/REPO:FILE, or bucket:OWNER/NAME:FILE (mounted)"
)


@task(
    help={
        "to": "a folder, github:OWNER/REPO or hf:OWNER/REPO",
        "folder": "a release folder",
        "channel": "also promote it to this channel",
        "dry_run": "show what would be sent, and end",
        "key": "for --channel: the file with the signing key, else FARM_SIGNING_KEY",
    }
)
@verb
def publish(
    _: Context,
    to: str | None = None,
    folder: str = "dist",
    channel: str | None = None,
    dry_run: bool = False,
    key: str | None = None,
) -> None:
    """Send a release to its place, the manifest last; files that it has are not sent again."""
    from farm import own_space, trust
    from farm.publish import gate as checking
    from farm.publish import places, publishing

    place = places.parse(to)
    wanted = None if channel is None else places.require_name("channel", channel)
    signer = None if wanted is None or dry_run else trust.signer(show.path(key))
    checked = None
    if signer is not None:
        report = checking.run(Path(folder), show.check)
        report.require_passed()
        checked = report.manifest_sha256
    plan = own_space.publish(Path(folder), place, dry_run=dry_run)
    if dry_run:
        return
    if (line := publishing.requirement(plan, place)) is not None:
        show.note(f"for requirements.txt of a Space: {line}")
    if wanted is not None and signer is not None:
        from farm.publish import channels

        show.promotion(channels.promote(place, plan.release, wanted, signer, checked=checked))


@task(
    help={
        "folder": "a release folder",
        "to": "instead of a folder: where the release is published",
        "release": "for --to: its name, e.g. b11549-1",
    }
)
@verb
def gate(
    _: Context, folder: str = "dist", to: str | None = None, release: str | None = None
) -> None:
    """Run the checks that a promotion demands, and print the digest of what passed."""
    from farm.publish import gate as checking
    from farm.publish import places

    if to is None and release is None:
        report = checking.run(Path(folder), show.check)
    else:
        name = places.require_name("release", release)
        report = checking.check_published(places.parse(to), name, show.check)
    show.gate(report)


@task(
    help={
        "release": "its name, e.g. b11549-1",
        "channel": "e.g. stable",
        "to": "where the release is published, and its channel is",
        "key": "the file with the signing key, else FARM_SIGNING_KEY",
        "days": "until it expires",
        "sha256": "of the manifest that `invoke gate` passed; without it, it is gated here",
        "serial": "the lowest to give, where the place has lost those that it gave before",
        "project": "OWNER/REPO that the signature names; the place's own if not given",
    }
)
@verb
def promote(
    _: Context,
    release: str,
    channel: str | None = None,
    to: str | None = None,
    key: str | None = None,
    days: str = "90",
    serial: str = "1",
    project: str | None = None,
    sha256: str | None = None,
) -> None:
    """Make a published release the current one of a channel, with the next serial; signs it."""
    from farm import trust
    from farm.publish import channels, places
    from farm.publish import gate as checking

    name = places.require_name("release", release)
    wanted = places.require_name("channel", channel)
    lasting, lowest = show.days("--days", days), show.number("--serial", serial) or 1
    gated = show.sha256("--sha256", sha256)
    place, signer = places.parse(to), trust.signer(show.path(key))
    named = places.project(project)
    checked = checking.require_gate(place, name, show.check, checked=gated)
    done = channels.promote(
        *(place, name, wanted, signer),
        days=lasting,
        at_least=lowest,
        project=named,
        checked=checked,
    )
    show.promotion(done)


@task(
    help={
        "channel": "e.g. stable",
        "to": "where it is",
        "key": "the file with the signing key, else FARM_SIGNING_KEY",
        "days": "until it expires",
        "project": "OWNER/REPO that the signature names; the place's own if not given",
    }
)
@verb
def rollback(
    _: Context,
    channel: str | None = None,
    to: str | None = None,
    key: str | None = None,
    days: str = "90",
    project: str | None = None,
) -> None:
    """Make the previous release of a channel current again, with a higher serial."""
    from farm import trust
    from farm.publish import channels, places

    wanted = places.require_name("channel", channel)
    place = places.parse(to)
    lasting, signer = show.days("--days", days), trust.signer(show.path(key))
    named = places.project(project)
    done = channels.rollback(place, wanted, signer, days=lasting, project=named)
    show.promotion(done)


@task(
    help={
        "to": "where the channels are",
        "channel": "one of them; without it each that ends soon",
        "within": "days; a channel that ends later is left as it is",
        "days": "until they expire",
        "key": "the file with the signing key, else FARM_SIGNING_KEY",
        "project": "OWNER/REPO that the signature names; the place's own if not given",
        "dry_run": "print the channels that end soon, and end; needs no key",
    }
)
@verb
def renew(
    _: Context,
    to: str | None = None,
    channel: str | None = None,
    within: str = "30",
    days: str = "90",
    key: str | None = None,
    project: str | None = None,
    dry_run: bool = False,
) -> None:
    """Sign channels that end soon again: the same release, a higher serial."""
    from farm import trust
    from farm.publish import channels, places

    place, lasting = places.parse(to), show.days("--days", days)
    named = places.project(project)
    due = channels.due(place, show.days("--within", within), channel)
    if dry_run:
        show.line(" ".join(due))
        return
    if not due:
        show.note(f"no channel of {place.where} ends within {within} days: nothing to renew")
    signer = trust.signer(show.path(key))
    for name in due:
        show.promotion(channels.renew(place, name, signer, days=lasting, project=named))


@task(help={"out": "the secret key's file; the public one gets .pub behind its name"})
@verb
def keygen(_: Context, out: str = "farm-signing.key") -> None:
    """Make a pair of minisign keys for channels, and print the public one."""
    from farm import trust

    public = trust.generate(Path(out))
    show.line(f"secret key: {out} (keep it; FARM_SIGNING_KEY takes its text)")
    show.line(f"public key: {public}")


@task(
    name="pin-space",
    help={
        "manifest": "a manifest's URL",
        "to": "where it is published, instead of --manifest",
        "release": "the release there to pin",
        "channel": "the channel there to follow, instead of --release",
        "public_key": "for --channel: the key that must have signed it (RW…)",
        "project": "for --channel: OWNER/REPO that it is signed for; the place's own if not given",
        "url": "instead of a release: any CUDA archive of llama.cpp, pinned by its digest",
        "suppose": "for --url: the host to check it for, instead of ZeroGPU",
    },
)
@verb
def pin_space(
    _: Context,
    manifest: str | None = None,
    to: str | None = None,
    release: str | None = None,
    channel: str | None = None,
    public_key: str | None = None,
    project: str | None = None,
    url: str | None = None,
    suppose: str | None = None,
) -> None:
    """Write spaces/release.json, which names a release or a channel; or pin an archive's URL."""
    from farm import own_space, trust
    from farm.publish import pin_space as pins_of
    from farm.publish import places

    show.one_of({"--manifest": manifest, "--release": release, "--channel": channel, "--url": url})
    if url is not None:
        found = pins_of.archive(url, (suppose,) if suppose else own_space.ZEROGPU)
        show.archive(found)
        for name, value in found.variables().items():
            show.line(f"{name}={value}")
        show.note("set both as variables of the Space, or: invoke space --to OWNER/NAME --url URL")
        return
    if manifest is not None:
        pin = pins_of.url(manifest)
    elif release is not None:
        pin = pins_of.release(places.parse(to), places.require_name("release", release))
    else:
        name = places.require_name("channel", channel)
        key = trust.require_public(show.given("--public-key", public_key))
        named = places.project(project)
        pin = pins_of.channel(places.parse(to), name, key, named)
    pins_of.write(pin.content)
    show.pin(pin, pins_of.FILE)


@task(
    name="deploy-space",
    iterable=["variable"],
    help={
        "to": "the Space: OWNER/NAME",
        "model": _MODEL_HELP,
        "variable": "NAME=VALUE, a variable of the Space; again for more. Secrets are refused",
        "hardware": "the Space's hardware; without it zero-a10g (ZeroGPU) for a new Space",
        "mount": "mount the model's repository in the Space, instead of a copy in its image",
        "adopt": "also upload to a Space that holds other files; none of them is deleted",
        "dry_run": "show what would be added, changed and deleted, and end",
    },
)
@verb
def deploy_space(
    _: Context,
    to: str | None = None,
    variable: list[str] | None = None,
    model: str | None = None,
    hardware: str | None = None,
    mount: bool = False,
    adopt: bool = False,
    dry_run: bool = False,
) -> None:
    """Upload spaces/ alone to a Space on the Hub, and set its variables and hardware."""
    from farm.publish import deploy_space as deploying

    wanted = deploying.hardware(hardware)
    space = show.given("--to", to)
    deployment = deploying.plan(space, variable or (), model=model, mount=mount)
    deploying.require_model(model)
    changes = deploying.compare(deployment, adopt=adopt)
    show.deployment(changes)
    if not dry_run:
        show.line(deploying.deploy(changes, hardware=wanted))


@task(
    iterable=["variable"],
    help={
        "to": "the Space: OWNER/NAME",
        "model": _MODEL_HELP,
        "mount": "mount the model's repository in the Space, instead of a copy in its image",
        "hardware": "the Space's hardware; without it zero-a10g (ZeroGPU) for a new Space",
        "variable": "NAME=VALUE, a variable of the Space; again for more. Secrets are refused",
        "url": "a CUDA archive of llama.cpp to run; nothing is built then",
        "releases": "where releases are published; without it hf:OWNER/llama-server",
        "release": "the release there to run; without it the newest that the hardware can run",
        "folder": "where a release is built; without it dist/SET",
        "line": "for a build: the CUDA line; without it the image's or the toolkit's, else cu128",
        "engine": "for a build: auto, docker, local",
        "image": "for a build: the devel image, instead of the line's",
        "source": "for a build: a folder with llama.cpp's source, instead of the pinned archive",
        "assume_build": "for --source: llama.cpp's build number, where its history has none",
        "patches": "auto (those of build/patches) or none",
        "adopt": "also upload to a Space that holds other files; none of them is deleted",
        "wait": "minutes to wait until the Space answers; 0: do not wait",
        "dry_run": "show what would be built, published and deployed, and end",
    },
)
@verb
def space(
    _: Context,
    to: str | None = None,
    model: str | None = None,
    mount: bool = False,
    hardware: str | None = None,
    variable: list[str] | None = None,
    url: str | None = None,
    releases: str | None = None,
    release: str | None = None,
    folder: str | None = None,
    line: str | None = None,
    engine: str = "auto",
    image: str | None = None,
    source: str | None = None,
    assume_build: str | None = None,
    patches: str = "auto",
    adopt: bool = False,
    wait: str = "40",
    dry_run: bool = False,
) -> None:
    """Make a Space that answers: build what it needs, publish, deploy. A second run resumes."""
    from farm import own_space
    from farm.terminal.progress import BuildReport

    wish = own_space.Wish(
        space=show.given("--to", to),
        model=model,
        mount=mount,
        variables=tuple(variable or ()),
        hardware=hardware,
        adopt=adopt,
        url=url,
        releases=releases,
        release=release,
        folder=show.path(folder),
        line=line,
        engine=engine,
        image=image,
        source=show.path(source),
        assume_build=show.number("--assume-build", assume_build),
        patches=patches,
        minutes=0 if wait == "0" else show.number("--wait", wait) or 0,
    )
    with BuildReport() as report:
        own_space.make(wish, report, dry_run=dry_run)


@task(
    help={
        "arch_set": "a set or group of build/targets.toml",
        "line": "the CUDA line, e.g. cu130; the set cpu needs none",
        "engine": "auto, docker, local",
        "image": "the devel image; without it the line's, else one made from packages",
        "toolkit": "for the local engine: a folder, or 'pypi' for NVIDIA's wheels",
        "source": "a folder with llama.cpp's source, instead of the pinned archive",
        "jobs": "compilers at a time in the first build; the second has one more",
        "patches": "auto (those of build/patches) or none",
    },
)
@verb
def reproducible(
    _: Context,
    arch_set: str = "cpu",
    line: str | None = None,
    engine: str = "docker",
    image: str | None = None,
    toolkit: str | None = None,
    source: str | None = None,
    jobs: str | None = None,
    patches: str = "auto",
) -> None:
    """Build a set twice from nothing, in two containers, and compare every byte."""
    from farm.reproduce import prove
    from farm.request import BuildRequest
    from farm.terminal.progress import BuildReport

    request = BuildRequest(
        arch_set=arch_set,
        line=line or ("cpu" if arch_set == "cpu" else None),
        engine=engine,
        image=image,
        toolkit=toolkit,
        source=Path(source) if source else None,
        jobs=show.number("--jobs", jobs),
        cached=False,
        patches=patches,
    )
    with BuildReport() as report:
        prove(request, report)


@task(
    help={
        "release": "a manifest's URL, or a release folder",
        "artifact": "which tarball of it",
        "sha256": "what the manifest's bytes must come to",
        "source": "the source tree, for what was built from a folder",
        "remote": "the repository that BUILD.json names, if you trust it and it is not llama.cpp's",
        "image": "another devel image than the recorded one",
        "toolkit": "for what the local engine built: a folder, or 'pypi'",
        "jobs": "compilers at a time",
    },
)
@verb
def rebuild(
    _: Context,
    release: str,
    artifact: str | None = None,
    sha256: str | None = None,
    source: str | None = None,
    remote: str | None = None,
    image: str | None = None,
    toolkit: str | None = None,
    jobs: str | None = None,
) -> None:
    """Build a published tarball again from its BUILD.json, and print whether it is identical."""
    from farm.rebuild import RebuildRequest
    from farm.rebuild import rebuild as build_again
    from farm.terminal.progress import BuildReport

    asked = RebuildRequest(
        release=release,
        artifact=artifact,
        sha256=sha256,
        source=Path(source) if source else None,
        remote=remote,
        image=image,
        toolkit=toolkit,
        jobs=show.number("--jobs", jobs),
    )
    with BuildReport() as report:
        build_again(asked, report)
