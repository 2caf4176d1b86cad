from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_loader import settings
from llama_loader.errors import LoaderError, SettingError
from llama_loader.settings import PREFIX, Settings, load

LOADER = Path(settings.__file__).parent
DIGEST = "ab" * 32


def of(**variables: str) -> Settings:
    """Settings from variables given without the seed's prefix."""
    return load(environ={PREFIX + name: value for name, value in variables.items()})


def test_the_defaults_are_the_documented_ones() -> None:
    found = load(environ={"HOME": "/home/user"})
    assert found.backend == "gguf"
    assert (found.manifest_url, found.manifest_sha256, found.url, found.sha256) == (None,) * 4
    assert found.devices == ()
    assert found.n_gpu_layers == 999
    assert found.allow_cpu is False
    assert found.gguf_repo_id == "mradermacher/translategemma-27b-it-i1-GGUF"
    assert found.gguf_filename == "translategemma-27b-it.i1-Q4_K_M.gguf"
    assert (found.n_ctx, found.temperature, found.max_new_tokens, found.max_chars) == (
        4096,
        0.0,
        1024,
        2000,
    )
    assert (found.server_port, found.startup_timeout) == (None, 120.0)
    assert (found.zerogpu_size, found.zerogpu_duration) == ("large", None)
    assert (found.cuda_arch, found.offline, found.hf_token) == (None, False, None)


@pytest.mark.parametrize(
    ("name", "value", "field", "expected"),
    [
        ("LLAMA_CPP_MANIFEST_URL", "hf://me/rel@main/manifest.json", "manifest_url", None),
        ("LLAMA_CPP_MANIFEST_SHA256", f"sha256:{DIGEST.upper()}", "manifest_sha256", DIGEST),
        ("LLAMA_CPP_URL", "https://example.org/a.tar.gz", "url", None),
        ("LLAMA_DEVICE", "auto", "devices", ()),
        ("LLAMA_DEVICE", "AUTO", "devices", ()),
        ("LLAMA_DEVICE", "CUDA0, CUDA1", "devices", ("CUDA0", "CUDA1")),
        ("LLAMA_DEVICE", "none", "devices", ("none",)),
        ("N_GPU_LAYERS", "-1", "n_gpu_layers", 999),
        ("N_GPU_LAYERS", "0", "n_gpu_layers", 0),
        ("ALLOW_CPU", "1", "allow_cpu", True),
        ("ALLOW_CPU", "False", "allow_cpu", False),
        ("GGUF_PATH", "/models/a b.gguf", "gguf_path", Path("/models/a b.gguf")),
        ("N_CTX", " 8192 ", "n_ctx", 8192),
        ("TEMPERATURE", "0.7", "temperature", 0.7),
        ("LLAMA_SERVER_PORT", "8080", "server_port", 8080),
        ("LLAMA_SERVER_STARTUP_TIMEOUT", "2.5", "startup_timeout", 2.5),
        ("ZEROGPU_SIZE", "xlarge", "zerogpu_size", "xlarge"),
        ("ZEROGPU_DURATION", "60", "zerogpu_duration", 60),
        ("CUDA_ARCH", "90", "cuda_arch", "90"),
        ("CUDA_ARCH", "12.0", "cuda_arch", "120"),
        ("CUDA_ARCH", "sm_90a", "cuda_arch", "90"),
        ("OFFLINE", "yes", "offline", True),
    ],
)
def test_each_variable_is_read(name: str, value: str, field: str, expected: object) -> None:
    found = getattr(of(**{name: value}), field)
    assert found == (value if expected is None else expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("BACKEND", "transformers"),
        ("LLAMA_CPP_MANIFEST_URL", "ftp://example.org/m.json"),
        ("LLAMA_CPP_MANIFEST_URL", "manifest.json"),
        ("LLAMA_CPP_MANIFEST_SHA256", "abc"),
        ("LLAMA_CPP_SHA256", ""),
        ("LLAMA_DEVICE", "CUDA0,,CUDA1"),
        ("LLAMA_DEVICE", "0"),
        ("LLAMA_DEVICE", "CUDA0,CUDA0"),
        ("LLAMA_DEVICE", "CUDA0, cuda0"),
        ("LLAMA_DEVICE", "auto,CUDA0"),
        ("LLAMA_DEVICE", "CUDA0,none"),
        ("LLAMA_DEVICE", "cpu,CUDA0"),
        ("LLAMA_DEVICE", ""),
        ("N_GPU_LAYERS", "-2"),
        ("N_GPU_LAYERS", "all"),
        ("N_GPU_LAYERS", "1e3"),
        ("ALLOW_CPU", "maybe"),
        ("ALLOW_CPU", ""),
        ("GGUF_REPO_ID", "https://huggingface.co/a/b"),
        ("GGUF_REPO_ID", "without-owner"),
        ("GGUF_PATH", "~nobody-of-that-name/m.gguf"),
        ("GGUF_FILENAME", "../../etc/passwd"),
        ("N_CTX", "0"),
        ("N_CTX", ""),
        ("N_CTX", "٤٠٩٦"),
        ("N_CTX", "4_096"),
        ("TEMPERATURE", "nan"),
        ("TEMPERATURE", "-0.1"),
        ("MAX_NEW_TOKENS", "0"),
        ("LLAMA_SERVER_PORT", "65536"),
        ("LLAMA_SERVER_PORT", "0"),
        ("LLAMA_SERVER_STARTUP_TIMEOUT", "0"),
        ("LLAMA_SERVER_STARTUP_TIMEOUT", "inf"),
        ("ZEROGPU_SIZE", "medium"),
        ("ZEROGPU_DURATION", "-1"),
        ("CUDA_ARCH", "hopper"),
        ("OFFLINE", "2"),
    ],
)
def test_what_cannot_be_parsed_names_the_variable_and_what_it_accepts(
    name: str, value: str
) -> None:
    with pytest.raises(SettingError) as caught:
        of(**{name: value})
    assert caught.value.exit_status == 2
    assert PREFIX + name in caught.value.message
    assert repr(value) in caught.value.message
    assert "default" in caught.value.hint


def test_options_win_and_are_named_as_options() -> None:
    environ = {PREFIX + "CUDA_ARCH": "80", PREFIX + "OFFLINE": "garbage"}
    found = load({"cuda_arch": "90", "offline": "1", "url": None}, environ)
    assert (found.cuda_arch, found.offline) == ("90", True)
    with pytest.raises(SettingError, match="--arch is 'x'"):
        load({"cuda_arch": "x"}, environ)


def test_a_pin_pins_something() -> None:
    found = of(LLAMA_CPP_SHA256=DIGEST, LLAMA_CPP_URL="https://example.org/a.tar.gz")
    assert found.sha256 == DIGEST
    with pytest.raises(SettingError, match="none is named") as caught:
        of(LLAMA_CPP_SHA256=DIGEST)
    assert "LLAMA_CPP_MANIFEST_SHA256" in caught.value.hint
    with pytest.raises(SettingError, match="--sha256"):
        load({"sha256": ""}, {})


@pytest.mark.parametrize(
    ("name", "value"), [("HF_TOKEN", "hf_se cret"), ("HF_ENDPOINT", "hf_secret")]
)
def test_a_secret_that_cannot_be_parsed_is_not_quoted(name: str, value: str) -> None:
    with pytest.raises(SettingError, match="not shown here") as caught:
        load(environ={name: value})
    assert "cret" not in caught.value.render()
    assert name in caught.value.message


def test_empty_text_is_unset() -> None:
    found = load(environ={PREFIX + "LLAMA_CPP_URL": "", "HF_TOKEN": " ", "HF_HOME": ""})
    assert (found.url, found.hf_token) == (None, None)


def test_the_store_is_under_hf_home_else_in_the_cache() -> None:
    assert load(environ={"HF_HOME": "/data/hf"}).store == Path("/data/hf/llama-loader")
    assert load(environ={"XDG_CACHE_HOME": "/c"}).store == Path("/c/llama-loader")
    assert load(environ={"HOME": "/h"}).store.name == "llama-loader"
    assert load({"store": "here"}, {}).store == Path.cwd() / "here"


def test_programs_inherit_an_allow_list_and_the_token_is_not_shown() -> None:
    found = load(
        environ={
            "PATH": "/bin",
            "CUDA_VISIBLE_DEVICES": "0",
            "LD_PRELOAD": "/evil.so",
            "LLAMA_ARG_CTX_SIZE": "1",
            "AIP_HTTP_PORT": "1",
            "HF_TOKEN": "hf_secret",
            "LD_LIBRARY_PATH": "/a::relative:/b",
            "SPACES_ZERO_GPU": "true",
        }
    )
    assert dict(found.inherited) == {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": "0"}
    assert found.library_path == (Path("/a"), Path("/b"))
    assert found.zerogpu is True
    assert "hf_secret" not in repr(found)


@given(
    st.sampled_from(sorted(row.variable for row in settings._FIELDS.values() if row.variable)),
    st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=40),
)
def test_any_text_is_taken_or_refused_in_words(variable: str, text: str) -> None:
    refused = None
    try:
        load(environ={variable: text})
    except LoaderError as error:
        refused = error
    if refused is not None:
        assert variable in refused.message
        assert "\n" not in refused.render().replace("\nhint: ", "")


def test_only_settings_reads_the_environment() -> None:
    for path in sorted(LOADER.rglob("*.py")):
        names = {
            f"{node.value.id}.{node.attr}"
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
        }
        reads = names & {"os.environ", "os.getenv", "os.environb"}
        assert not reads or path.name == "settings.py", path


def test_only_processes_starts_programs() -> None:
    for path in sorted(LOADER.rglob("*.py")):
        imported = {
            alias.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import)
            for alias in node.names
        }
        if path.name == "server.py":
            continue  # for its types only: the import stands under TYPE_CHECKING
        assert "subprocess" not in imported or path.name == "processes.py", path
