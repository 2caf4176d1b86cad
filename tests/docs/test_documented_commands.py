"""Every command in the documentation is run by a test, or says what it needs that no test has."""

import re
import shlex
from pathlib import Path

import documented
import pytest
from invoke.collection import Collection
from invoke.parser import Parser

import tasks

TESTS = Path(__file__).resolve().parents[1]
EVERY = [one for page in documented.PAGES for one in documented.commands(page)]
NEEDS = re.compile(
    r"needs (?:an? GitHub account|an account|a GPU|another host|its devel image|half an hour)"
)
"""What a comment says where no machine of ours can run the command."""
WHOLE = {"docs/publishing.md": "test_the_guide_to_publishing_command_by_command"}
"""Pages of which a test runs every command in order, as it stands there."""
SESSION = "this test is a part of what it runs: `.ci/run` calls it"
BUILDER = CI_OWNER = "test_the_builder_s_and_the_ci_owner_s_commands_after_a_build"
SPACE_OWNER = "test_the_space_owner_s_commands"
ALONE = "test_the_folder_alone_serves_its_page_and_says_that_no_release_is_set"
DEPLOYED = "test_hosts_that_are_reached_over_ssh"
HOSTS = "test_sets_of_lost_hosts_are_built_in_the_order_they_had"
CURL = "test_curl_lines_of_the_readme_stream_a_translation"
LOADER, MANIFEST = "python3 -m llama_loader", "--manifest https://…/manifest.json"
HOST = "capability=12.0,driver=580,glibc=2.36,torch=cu128"
SEED = (
    '--archs "80;86;89;90" --image nvidia/cuda:12.4.1-devel-ubuntu22.04 --ref b11549'
    " --format tar.gz --out dist --copy out/llama-server-cuda-ubuntu-x64.tar.gz"
)
RUN = {
    # nox
    "python3 -m pip install nox && python3 -m nox -s demo": "test_the_demo_of_the_readme",
    "python3 -m nox": SESSION,
    "FARM_REQUIRE_ALL=1 python3 -m nox": SESSION,
    "python3 -m nox -l": "test_the_sessions_are_listed",
    "python3 -m nox -s unit": SESSION,
    "python3 -m pip install --require-hashes -r requirements.lock": SESSION,
    # the loader
    "cd spaces": SPACE_OWNER,
    "python3 -m pip install -r requirements.txt": ALONE,
    f"{LOADER} doctor {MANIFEST} --model model.gguf": SPACE_OWNER,
    "curl http://127.0.0.1:41873/v1/chat/completions"
    ' -H "Authorization: Bearer 2cVDSnxlfyJ…"'
    """ -d '{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 64}'""": SPACE_OWNER,
    f"{LOADER} doctor {MANIFEST} --suppose {HOST}": SPACE_OWNER,
    f"{LOADER} fetch {MANIFEST}": SPACE_OWNER,
    f"{LOADER} serve {MANIFEST} --model model.gguf": SPACE_OWNER,
    'python3 -m pip install -r requirements.txt "gradio[mcp]" spaces huggingface_hub': ALONE,
    "YAKULINGO_SPACES_ALLOW_CPU=1 YAKULINGO_SPACES_GGUF_PATH=model.gguf"
    " YAKULINGO_SPACES_LLAMA_CPP_MANIFEST_URL=… python3 app.py": ALONE,
    f"{LOADER} doctor --suppose {HOST}": SPACE_OWNER,
    "API=https://OWNER-SPACE.hf.space/gradio_api/call": CURL,
    "ID=$(curl -s $API/translate --json"
    """ '{"data": ["今日はいい天気です。", "en", "auto"]}' | cut -d '"' -f 4)""": CURL,
    "curl -sN $API/translate/$ID": CURL,
    "invoke pin-space --url https://…/llama-bin-linux-cuda-x64.tar.gz": (
        "test_archive_says_beforehand_whether_a_host_can_run_it"
    ),
    "invoke space --to OWNER/SPACE --model 4b --dry-run": (
        "test_what_can_be_refused_at_once_is_refused_before_a_build"
    ),
    # building
    "invoke targets": BUILDER,
    "invoke build-cpu": "test_the_release_says_what_its_binaries_hold",
    "invoke base-image --line cu130": "test_cu130_takes_the_wheels_toolkit_along",
    "invoke cuda-runtime --line cu130 --out dist": "test_what_the_manifest_says_of_it",
    "invoke rebuild https://…/manifest.json --artifact"
    " llama-server-b11549-cu130-sm90-linux-x86_64.tar.zst": (
        "test_the_same_comes_out_from_a_folder_a_file_and_over_http_without_a_compiler_cache"
    ),
    "invoke manifest --out dist": BUILDER,
    "invoke verify dist": BUILDER,
    "invoke smoke dist": BUILDER,
    "invoke status --folder dist": BUILDER,
    "invoke serve-release --folder dist": SPACE_OWNER,
    "invoke publish --to hf:OWNER/REPO": BUILDER,
    "invoke promote b11549-1 --channel stable --to hf:OWNER/REPO": BUILDER,
    # CI
    "invoke targets --json": CI_OWNER,
    f"invoke build-cuda --engine docker {SEED}": "test_the_seed_s_workflow_with_its_defaults",
    "invoke build-cuda --engine docker --arch-set sm90 --line cu128 --out dist": (
        "test_a_set_that_fails_keeps_its_log_and_its_cache_and_uploads_no_tarball"
    ),
    "invoke manifest --out dist --release b11549-1": CI_OWNER,
    "invoke publish --to /srv/releases": CI_OWNER,
    "invoke promote b11549-1 --channel candidate --to /srv/releases": CI_OWNER,
    "invoke update-pins --newest": "test_the_weekly_run_proposes_the_newest_llama_cpp",
    "invoke verify https://…/manifest.json --sha256 …": SPACE_OWNER,
    # several hosts
    "invoke build-cuda --arch-set zerogpu --engine dask": (
        "test_sets_on_this_machine_with_one_that_fails_twice"
    ),
    "invoke build-cuda --arch-set zerogpu --engine dask --scheduler tcp://builder:8786": HOSTS,
    "python3 -m venv .venv": DEPLOYED,
    ".venv/bin/python -m pip install --require-hashes -r requirements-cluster.lock": DEPLOYED,
    ".venv/bin/python -m pip install --no-deps -e .": DEPLOYED,
    "mkdir -p .venv/etc/dask": DEPLOYED,
    'echo "temporary-directory: $PWD/.farm/dask" > .venv/etc/dask/farm.yaml': DEPLOYED,
    ".venv/bin/dask scheduler --port 8786": HOSTS,
    ".venv/bin/dask worker tcp://builder:8786 --nthreads 1 --resources FARM_BUILD=1": HOSTS,
}
"""Commands, and the tests that run them or the same with other names."""


def test_no_command_stands_in_a_block_of_another_kind() -> None:
    for page in documented.PAGES:
        for language, text in documented.fences(page):
            assert language in {"console", "", "json", "toml", "mermaid", "python"}, page
            if language != "console":
                assert not re.search(r"^\$ |^(?:invoke|python3?|pip) ", text, re.MULTILINE), page


@pytest.mark.parametrize("page", sorted({one.page for one in EVERY}))
def test_every_command_is_run_or_marked(page: str) -> None:
    for one in documented.commands(page):
        is_run = one.text in RUN or one.page in WHOLE
        assert is_run != bool(NEEDS.search(one.comment)), f"{page}: {one.text}  # {one.comment}"


def test_the_tests_that_run_them_exist_and_no_row_is_left_over() -> None:
    sources = "".join(path.read_text("utf-8") for path in TESTS.rglob("test_*.py"))
    named = {name for name in (*RUN.values(), *WHOLE.values()) if name != SESSION}
    there = set(re.findall(r"def (test_\w+)", sources))
    assert named - there == set()
    assert RUN.keys() - {one.text for one in EVERY} == set()
    assert WHOLE.keys() <= set(documented.PAGES)


@pytest.mark.parametrize(
    "path", [".ci/run", "noxfile.py", *sorted(documented.PROJECT.glob(".github/workflows/*.yml"))]
)
def test_ci_installs_nothing_without_a_hash(path: str | Path) -> None:
    text = (documented.PROJECT / path).read_text("utf-8")
    asked = re.findall(
        r"^.*(?:\bpipx?|\buv pip|session)[ .]install\b.*$|^.*\buvx\b.*$", text, re.MULTILINE
    )
    assert all("--require-hashes" in line for line in asked), asked
    assert asked or path not in (".ci/run", "noxfile.py")


def test_every_verb_and_option_exists() -> None:
    """Also of the commands that are not run here: invoke's own parser takes them."""
    contexts = Collection.from_module(tasks).to_contexts()
    lines = [one.text[one.text.index("invoke ") :] for one in EVERY if "invoke " in one.text]
    assert len(lines) > 40
    for line in lines:
        words = shlex.split(line.replace("build-cuda …", "build-cuda"))[1:]
        parsed = Parser(contexts=contexts).parse_argv(words)
        assert [context.name for context in parsed] == [words[0]], line


def test_every_verb_and_option_in_a_sentence_exists() -> None:
    known = {one.name: one.flags for one in Collection.from_module(tasks).to_contexts()}
    said = [(page, call) for page in documented.PAGES for call in documented.in_sentences(page)]
    assert len(said) > 40
    for page, (verb, options) in said:
        assert verb in known, f"{page}: invoke {verb}"
        assert options <= known[verb].keys(), f"{page}: invoke {verb} {options}"
