"""``invoke space``: from nothing to a Space that answers, by the steps of the other verbs.

A second run resumes: it uses the release that is published, the tarballs that are built, and the
files that the Space has.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import requests

from farm import cuda_runtime, durable, loader, pipeline, preflight, release
from farm.errors import FarmError, PublishError, UsageError, remark
from farm.inputs import packages
from farm.options import BuildRequest, Deploy, Wish, one_of
from farm.publish import deploy_space, gate, hub, pin_space, places, publishing
from farm.publish.directory import Directory
from farm.publish.places import Destination
from farm.publish.publishing import Plan
from farm.request import resolve
from farm.terminal import show
from farm.terminal.progress import BuildReport

_ENDED: Final = frozenset({"BUILD_ERROR", "RUNTIME_ERROR", "CONFIG_ERROR", "STOPPED", "PAUSED"})
"""Stages of a Space in which waiting is useless."""
_INTERVAL_S: Final = 5.0
_PAGE: Final = re.compile(r"https://[a-z0-9-]+\.hf\.space/?")
"""The addresses of Spaces, which may get the account's token. Another Hub's are on its own host."""
_PAGE_S: Final = (10.0, 30.0)
"""Seconds to connect to a Space's page, and between two reads."""


@dataclass(frozen=True)
class Host:
    """What a Space's hardware can run.

    Attributes:
        arch_set: the set or group of ``build/targets.toml`` for it.
        facts: for the loader's ``--suppose``; Debian 12's libraries, the oldest that Spaces have.
    """

    arch_set: str
    facts: str

    @property
    def options(self) -> tuple[str, ...]:
        """Further options of the loader for this host."""
        return ("--allow-cpu",) if self.arch_set == "cpu" else ()


_OLDEST: Final = "glibc=2.36,glibcxx=3.4.30"
_HOSTS: Final = {
    "cpu": Host("cpu", _OLDEST),
    "zero": Host("zerogpu", f"capability=12.0,driver=580,{_OLDEST},torch=cu128"),
    "rtx-pro-6000": Host("sm120", f"capability=12.0,{_OLDEST}"),
    "t4": Host("sm75", f"capability=7.5,{_OLDEST}"),
    "l4": Host("sm89", f"capability=8.9,{_OLDEST}"),
    "a10g": Host("sm86", f"capability=8.6,{_OLDEST}"),
    "a100": Host("sm80", f"capability=8.0,{_OLDEST}"),
}
"""The hosts, by the beginning of the Hub's name of the hardware."""


ZEROGPU: Final = (_HOSTS["zero"].facts, _HOSTS["zero"].facts.replace("12.0", "9.0"))
"""ZeroGPU as it is today, and with the H200 that it had before."""


def host_of(hardware: str) -> Host:
    """Return the facts about a Space's hardware, or raise ``HARDWARE_UNKNOWN``."""
    for beginning, host in _HOSTS.items():
        if hardware.startswith(beginning):
            return host
    raise UsageError("HARDWARE_UNKNOWN/set", hardware=hardware)


def make(wish: Wish, report: BuildReport) -> None:
    """Find or build a release, pin it, deploy the Space, wait for its page, print its address.

    Everything that can be refused at once is checked before anything is built.

    Raises:
        FarmError: a step failed; a second run resumes.
    """
    _require_consistent(wish)
    hardware = deploy_space.hardware(wish.hardware)
    usual = (hardware or deploy_space.HARDWARE).value
    host_of(usual)
    looked_at = deploy_space.plan(wish, release={})
    for warning in looked_at.unknown():
        report.say(warning)
    try:
        hub.Hub(wish.to).require_writable()
    except FarmError as error:
        if not wish.dry_run:
            raise
        report.say(f"note[{error.code}]: without --dry-run it ends here: {error.message}")
    report.say(f"looking at Space {wish.to}, its model and hardware")
    wish = replace(wish, model=deploy_space.found_model(wish.model))
    found = deploy_space.compare(looked_at, adopt=wish.adopt)
    if hardware is None and found.head and not found.hardware:
        report.say(remark("HARDWARE_UNKNOWN/hub", usual=usual))
    wish = replace(wish, hardware=usual if hardware else found.hardware or usual)
    host = host_of(wish.hardware or usual)
    variables, pin = _chosen(wish, host, report)
    wish = replace(wish, variable=(*variables, *wish.variable))
    planned = deploy_space.plan(wish, release=pin)
    report.say(f"comparing spaces/ with Space {wish.to}")
    changes = deploy_space.compare(planned, adopt=wish.adopt)
    show.deployment(changes, hardware)
    if wish.dry_run:
        return
    address = deploy_space.deploy(changes, hardware=hardware)
    if wish.wait:
        wait(wish.to, wish.wait * 60, report.say, interval=_INTERVAL_S)
    show.line(address)


def _require_consistent(wish: Wish) -> None:
    """Refuse options that would be ignored beside ``--url``, and releases that no Space can read.

    Raises:
        UsageError: ``OPTIONS_INVALID``.
        PublishError: ``PIN_IS_LOCAL``.
    """
    if wish.url is not None:
        usual = vars(BuildRequest())
        asked = {name: one for name, one in vars(wish.build).items() if one != usual[name]}
        asked |= {"releases": wish.releases, "release": wish.release, "folder": wish.folder}
        beside = {f"--{name.replace('_', '-')}": one for name, one in asked.items()}
        one_of({"--url": wish.url}, {"--url": ()}, beside)
    elif wish.releases and isinstance(places.parse(wish.releases), Directory):
        raise PublishError("PIN_IS_LOCAL/folder", folder=wish.releases)


def publish(folder: Path, place: Destination, *, dry_run: bool = False) -> Plan:
    """Publish a release folder, with the wheel ``llama-space`` beside it, and show each part.

    Raises:
        FarmError: the folder is no whole release, or the place refuses.
    """
    if not dry_run:
        place.require_writable()
    with tempfile.TemporaryDirectory(prefix="llama-farm-wheel-") as made:
        wheel = loader.build_wheel(Path(made))
        durable.require_own_out(folder)  # afterwards: a missing one could be made meanwhile
        plan = publishing.prepare(folder, place, show.note, wheel=wheel)
        show.plan(plan, each=dry_run)  # what is sent is told file by file
        if not dry_run:
            place.publish(plan, show.line)
            show.line(place.manifest_url(plan.release))
            line = publishing.requirement(plan, place)
            if line is not None and "@ file:" not in line:  # which no Space could read
                show.note(f"for requirements.txt of a Space: {line}")
    return plan


def _chosen(
    wish: Wish, host: Host, report: BuildReport
) -> tuple[tuple[str, ...], Mapping[str, Any] | None]:
    """Return what chooses the llama-server: NAME=VALUE of variables, and the ``release.json``."""
    if wish.url is not None:
        report.say(f"downloading {wish.url}")
        found = pin_space.archive(wish.url, (host.facts,), host.options)
        show.archive(found)
        return tuple(f"{name}={value}" for name, value in found.variables().items()), {}
    if not wish.release and not wish.releases and pin_space.FILE.is_file():
        require_pin_runs(wish, report.say)
        return (), None
    place = places.parse(wish.releases or f"hf:{wish.to.partition('/')[0]}/llama-server")
    if wish.release:
        named = place.small(places.require_name("release", wish.release), release.MANIFEST)
        _require_runs(named, wish, f"{wish.release} of {place.where}")
    name = wish.release or _usable(place, wish, host, report)
    if name is None:  # of a dry run: the release's address is known once it is published
        return (), {"manifest_url": "of the release that is published then"}
    report.say(f"release: {name} of {place.where}")
    return (), pin_space.release(place, places.require_name("release", name)).content


def require_pin_runs(asked: Deploy, say: Callable[[str], None]) -> None:
    """Refuse the release of ``spaces/release.json`` if the hardware that is named cannot run it."""
    say(f"release: the one that {pin_space.FILE.name} in spaces/ pins")
    url = pin_space.manifest_url()
    try:
        host_of(asked.hardware or "")
        manifest = gate.read_manifest(url)
    except FarmError as error:  # a private repository: the Space's own token can read it
        say(f"note[{error.code}]: not compared with the hardware: {error.message}")
    else:
        _require_runs(manifest, asked, url)


def _require_runs(manifest: bytes, wish: Deploy, what: str) -> None:
    """Refuse a release that was named, and that the hardware cannot run."""
    host = host_of(wish.hardware or "")
    allowed = any(one.endswith("_ALLOW_CPU=1") for one in wish.variable)
    said = _refusal(manifest, host, *(("--allow-cpu",) if allowed else ()))
    if said:
        raise PublishError("RELEASE_CANNOT_RUN", what=what, hardware=wish.hardware, said=said)


def _usable(place: Destination, wish: Wish, host: Host, report: BuildReport) -> str | None:
    """Return the newest published release that the hardware can run, publishing one if needed."""
    folder = wish.folder or Path("dist") / host.arch_set
    published = _newest(place, host, report)
    built = None
    if (folder / release.MANIFEST).is_file() and not _refusal(release.content(folder), host):
        built = release.load(folder).release
    if published and built not in {None, published}:
        built = None  # an older one, or one that was never published
    if published and (wish.dry_run or built is None):
        return published
    if wish.dry_run:
        if built:
            report.say(f"release: {folder} would be published to {place.where}")
        else:
            told = f"would be built into {folder} and published to {place.where}"
            report.say(f"release: {host.arch_set} {told}")
            request = _request(folder, wish, host)
            try:
                pipeline.choose_engine(request, resolve(request)[0], report).close()
            except FarmError as error:
                told = f"without --dry-run it ends here: {error.message}"
                report.say(f"note[{error.code}]: {told}")
        return None
    if built is None:
        _build(folder, wish, host, report)
    return publish(folder, place).release


def _newest(place: Destination, host: Host, report: BuildReport) -> str | None:
    """Return the newest published release that the hardware can run; name those passed over."""
    report.say(f"looking for a release at {place.where}")
    names = place.releases()
    for name in reversed(names):
        said = _refusal(place.small(name, release.MANIFEST), host)
        if not said:
            return name
        report.say(f"release: {name} of {place.where} is skipped: {said}")
    if not names:
        report.say(f"release: none at {place.where} yet")
    return None


def _refusal(manifest: bytes, host: Host, *options: str) -> str:
    """Return the loader's sentence if the hardware cannot run a manifest's release, or ``""``."""
    done = loader.suppose(manifest, host.facts, *host.options, *options)
    line = done.stderr.strip().partition("\n")[0] if done.returncode else ""
    return re.sub(r"^error\[(\w+)\]: (.*)", r"\2 (\1)", line)


def _request(folder: Path, wish: Wish, host: Host) -> BuildRequest:
    """Return the build of the hardware's sets."""
    line = "cpu" if host.arch_set == "cpu" else wish.build.line
    return replace(wish.build, arch_set=host.arch_set, line=line, out=folder)


def _build(folder: Path, wish: Wish, host: Host, report: BuildReport) -> None:
    """Build the hardware's sets, and pack CUDA's libraries where the hardware lacks them."""
    report.say(f"building {host.arch_set} into {folder}")
    preflight.build(_request(folder, wish, host), report)
    said = _refusal(release.content(folder), host)
    toolkits = {one.cuda.toolkit for one in release.load(folder).artifacts if one.cuda}
    if toolkits and "(CUDA_LIBRARY_MISSING)" in said:
        line = f"cu{max(toolkits).replace('.', '')}"
        cuda_runtime.make(line, folder)
        release.write(folder)
        said = _refusal(release.content(folder), host)
    if said:
        name = "RELEASE_CANNOT_RUN/built"
        raise PublishError(name, folder=folder, hardware=wish.hardware, said=said)


def wait(space: str, seconds: float, tell: Callable[[str], None], *, interval: float) -> None:
    """Wait until the Space runs its newest commit and its page answers.

    ``tell`` takes a line for each stage that the Hub reports; ``interval``: seconds between two
    requests.

    Raises:
        PublishError: ``SPACE_FAILED``: the Space was not built, or did not start;
            ``SPACE_NOT_READY``: it does not answer in time; or the Hub refuses.
    """
    api, until, before = hub.api(), time.monotonic() + seconds, ""
    logs = f"{api.endpoint}/spaces/{space}?logs=container"
    with hub.hub_errors(f"Space {space}"):
        info = api.space_info(space)
        is_page = _PAGE.fullmatch(host := str(info.host or ""))
        own = rf"https?://{re.escape(urlsplit(api.endpoint).hostname or '')}(:[0-9]+)?/?"
        if host and not is_page and not re.fullmatch(own, host):
            raise places.unusable(f"the Hub (page of {space})", f"{host!r:.80} is no Space's page")
        token = api.token if info.private and is_page and isinstance(api.token, str) else None
    while True:
        with hub.hub_errors(f"Space {space}"):
            runtime = api.get_space_runtime(space)
        stage, is_new = str(runtime.stage), runtime.raw.get("sha") in (None, info.sha)
        told = f"Space {space}: {stage.lower().replace('_', ' ')}"
        if is_new and stage == "RUNNING":
            most = f"at most {seconds / 60:g} minutes, --wait"
            told += f"; waiting for its page to answer ({most})"
        if told != before:
            tell(told)
        before = told
        if is_new and stage in _ENDED:
            said = " ".join(str(runtime.raw.get("errorMessage") or "").split())[:300]
            said = said and f": {said}"
            raise PublishError("SPACE_FAILED", space=space, stage=stage, said=said, logs=logs)
        said = _silence(host, token) if is_new and stage == "RUNNING" else stage
        if not said:
            return
        if time.monotonic() >= until:
            raise PublishError(
                "SPACE_NOT_READY", space=space, minutes=seconds / 60, said=said, logs=logs
            )
        time.sleep(interval)


def _silence(address: str, token: str | None) -> str:
    """Ask for the Space's page, a private one with the account's token; ``""`` if it is there."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with (
            packages.session() as web,
            web.get(address, timeout=_PAGE_S, headers=headers, stream=True) as answer,
        ):
            return "" if answer.ok else f"its page has HTTP status {answer.status_code}"
    except requests.RequestException as error:
        return f"its page gives no answer: {type(error).__name__}"
