import os
import pwd
import re
from pathlib import Path

import pytest

from llama_loader import settings
from llama_loader.errors import SettingError
from llama_loader.settings import PREFIX, Settings, load
from tests.loader.test_disk import not_small
from tests.rigs.refusals import refused

LOADER = Path(settings.__file__).parent
DIGEST = "ab" * 32


def of(**variables: str) -> Settings:
    """Settings from variables given without their prefix."""
    return load(environ={PREFIX + name: value for name, value in variables.items()})


def test_the_defaults_are_the_documented_ones() -> None:
    found = vars(load(environ={"HOME": "/home/user"}))
    documented = {
        **dict.fromkeys(("manifest_url", "manifest_sha256", "url", "sha256", "max_new_tokens")),
        **dict.fromkeys(
            ("server_port", "load_threads", "zerogpu_duration", "cuda_arch", "hf_token")
        ),
        "backend": "gguf",
        "devices": (),
        "n_gpu_layers": 999,
        "n_ctx": 4096,
        "allow_cpu": False,
        "offline": False,
        "zerogpu_size": "large",
        "temperature": 0.0,
        "max_chars": 20_000,
        "startup_timeout": 120.0,
        "gguf_repo_id": "mradermacher/translategemma-27b-it-i1-GGUF",
        "gguf_filename": "translategemma-27b-it.i1-Q4_K_M.gguf",
    }
    assert {name: found[name] for name in documented} == documented


READ = {
    "LLAMA_CPP_MANIFEST_SHA256": ("manifest_sha256", {f"sha256:{DIGEST.upper()}": DIGEST}),
    "LLAMA_DEVICE": (
        "devices",
        {"AUTO": (), "CUDA0, CUDA1": ("CUDA0", "CUDA1"), "none": ("none",)},
    ),
    "N_GPU_LAYERS": ("n_gpu_layers", {"-1": 999, "0": 0}),
    "ALLOW_CPU": ("allow_cpu", {"1": True, "False": False}),
    "GGUF_PATH": ("gguf_path", {"/models/a b.gguf": Path("/models/a b.gguf")}),
    "N_CTX": ("n_ctx", {" 8192 ": 8192}),
    "TEMPERATURE": ("temperature", {"0.7": 0.7}),
    "LLAMA_SERVER_PORT": ("server_port", {"8080": 8080}),
    "LOAD_THREADS": ("load_threads", {"0": 0, "32": 32}),
    "LLAMA_SERVER_STARTUP_TIMEOUT": ("startup_timeout", {"2.5": 2.5}),
    "ZEROGPU_SIZE": ("zerogpu_size", {"xlarge": "xlarge"}),
    "ZEROGPU_DURATION": ("zerogpu_duration", {"60": 60, "computed": None}),
    "CUDA_ARCH": ("cuda_arch", {"90": "90", "12.0": "120", "sm_90a": "90"}),
    "OFFLINE": ("offline", {"yes": True}),
    **{
        f"LLAMA_CPP_{name.upper()}": (name, {url: url})
        for name in ("manifest_url", "url")
        for url in ("hf://me/rel@main/manifest.json",)
    },
}


@pytest.mark.parametrize("name", READ)
def test_each_variable_is_read(name: str) -> None:
    field, values = READ[name]
    for text, value in values.items():
        assert getattr(of(**{name: text}), field) == value


def test_options_win_and_are_named_as_options() -> None:
    environ = {PREFIX + "CUDA_ARCH": "80", PREFIX + "OFFLINE": "garbage"}
    found = load({"cuda_arch": "90", "offline": "1", "url": None}, environ)
    assert (found.cuda_arch, found.offline) == ("90", True)
    with pytest.raises(SettingError, match="--arch is 'x'"):
        load({"cuda_arch": "x"}, environ)
    with pytest.raises(SettingError, match=f"as a URL it is {Path(__file__).as_uri()}"):
        load({"manifest_url": os.path.relpath(__file__)}, environ)


def test_pin_without_anything_to_pin_is_a_setting_error() -> None:
    found = of(LLAMA_CPP_SHA256=DIGEST, LLAMA_CPP_URL="https://example.org/a.tar.gz")
    assert found.sha256 == DIGEST
    with pytest.raises(SettingError, match="none is named") as caught:
        of(LLAMA_CPP_SHA256=DIGEST)
    assert "LLAMA_CPP_MANIFEST_SHA256" in caught.value.hint
    with pytest.raises(SettingError, match="--sha256"):
        load({"sha256": ""}, {})


@pytest.mark.parametrize("text", ["", " \t"])
def test_an_empty_variable_counts_as_unset(text: str) -> None:
    names = [name for row in settings._FIELDS.values() for name in row.variables]
    others = ["HF_HOME", "HF_TOKEN_PATH", "HF_HUB_OFFLINE", "SPACES_ZERO_GPU", "LD_LIBRARY_PATH"]
    found = load(environ={"HOME": "/h"} | dict.fromkeys([*names, *others], text))
    assert found == load(environ={"HOME": "/h"})


def test_an_empty_variable_of_the_hub_is_gone_before_its_client_reads_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hubs = ("HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE")
    names = (*hubs, "XDG_CACHE_HOME", "HOME", "TQDM_MININTERVAL")  # tqdm: its progress bars
    for name in names:
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    found = load()
    assert found.hf_endpoint == "https://huggingface.co"
    own = Path(pwd.getpwuid(os.getuid()).pw_dir)  # with HOME= Python takes the root folder
    assert found.store == own / ".cache" / "llama-loader"
    assert not set(names) & os.environ.keys()
    assert "HF_HUB_DISABLE_XET" in os.environ


def test_every_variable_may_have_the_neutral_prefix() -> None:
    environ = {
        "LLAMA_SPACE_N_CTX": "8192",
        "YAKULINGO_SPACES_ALLOW_CPU": "1",
        "LLAMA_SPACE_ALLOW_CPU": "yes",  # the same value in other letters
        "YAKULINGO_SPACES_CUDA_ARCH": "",
        "LLAMA_SPACE_CUDA_ARCH": "90",
    }
    found = load(environ=environ)
    assert (found.n_ctx, found.allow_cpu, found.cuda_arch) == (8192, True, "90")
    assert found.prefix == PREFIX
    assert load(environ={"LLAMA_SPACE_N_CTX": "8192"}).prefix == "LLAMA_SPACE_"
    assert load(environ={}, n_ctx=8192).prefix == "LLAMA_SPACE_"
    for row in settings._FIELDS.values():
        prefixes = [name for name in row.variables if name.startswith("LLAMA_SPACE_")]
        assert bool(prefixes) == row.variable.startswith(PREFIX)


def test_message_tells_which_of_its_variables_are_set_without_a_prefix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    environ = {"GGUF_PATH": "m.gguf", "ALLOW_CPU": "1", "LLAMA_SPACE_ALLOW_CPU": "1"}
    monkeypatch.setattr(os, "environ", environ)
    told = settings.named(f"set {PREFIX}ALLOW_CPU or {PREFIX}GGUF_PATH")
    assert told.endswith("_GGUF_PATH; set without the prefix LLAMA_SPACE_: GGUF_PATH")
    assert settings.named(told) == told
    given = load(environ={}, gguf_path="m.gguf")
    hint = f"correct {PREFIX}GGUF_PATH (on a command line --model, in Python gguf_path); else"
    assert settings.named(hint, given) == "correct gguf_path; else"


def test_both_prefixes_with_different_values_are_an_error_that_names_both() -> None:
    both = {
        "YAKULINGO_SPACES_LLAMA_CPP_URL": "https://u:s3cret@h/a",
        "LLAMA_SPACE_LLAMA_CPP_URL": "https://h/b",
    }
    with refused("SETTING_CONFLICT", SettingError) as caught:
        load(environ=both)
    assert all(name in caught.value.message for name in both)
    assert "s3cret" not in caught.value.render()
    assert load({"url": "https://h/c"}, both).url == "https://h/c"  # neither one counts then


def test_manifest_as_an_option_drops_an_archive_of_the_environment() -> None:
    environ = {"LLAMA_SPACE_LLAMA_CPP_URL": "https://h/b", "LLAMA_SPACE_LLAMA_CPP_SHA256": "0" * 64}
    told = load({"manifest_url": "https://h/m.json"}, environ)
    assert (told.url, told.sha256) == (None, None)
    assert load({"manifest_url": "https://h/m.json", "url": "https://h/c"}, environ).sha256


def test_quantisation_beside_a_file_is_a_conflict() -> None:
    given = {"YAKULINGO_SPACES_GGUF_REPO_ID": "me/model:Q4_K_M", "HOME": "/nowhere"}
    assert load(environ=given).gguf_repo_id == "me/model:Q4_K_M"
    with refused("SETTING_CONFLICT", SettingError, "two models"):
        load(None, {}, gguf_path="m.gguf", gguf_repo_id="me/model")
    with refused("SETTING_CONFLICT", SettingError, "names a quantisation"):
        load(environ={**given, "YAKULINGO_SPACES_GGUF_FILENAME": "m.gguf"})


def test_keywords_are_typed_and_win_over_variables(tmp_path: Path) -> None:
    environ = {
        "YAKULINGO_SPACES_N_CTX": "1024",
        "YAKULINGO_SPACES_ALLOW_CPU": "0",
        "LLAMA_SPACE_MAX_CHARS": "77",
    }
    for keyword, value, field, expected in (
        ("n_ctx", 8192, "n_ctx", 8192),
        ("allow_cpu", True, "allow_cpu", True),
        ("max_chars", None, "max_chars", 77),
        ("gguf_path", tmp_path / "m.gguf", "gguf_path", tmp_path / "m.gguf"),
        ("llama_cpp_manifest_url", "hf://me/r/m.json", "manifest_url", "hf://me/r/m.json"),
        ("llama_device", ["CUDA0", "CUDA1"], "devices", ("CUDA0", "CUDA1")),
        ("temperature", 1e-5, "temperature", 1e-5),
        ("n_gpu_layers", -1, "n_gpu_layers", 999),
        ("cuda_arch", "12.0", "cuda_arch", "120"),
        ("hf_token", "hf_x", "hf_token", "hf_x"),
        ("hf_endpoint", "https://hub.example/", "hf_endpoint", "https://hub.example"),
        ("hf_home", tmp_path, "store", tmp_path / "llama-loader"),
        ("store", str(tmp_path), "store", tmp_path),
    ):
        assert getattr(load(None, environ, **{keyword: value}), field) == expected
    assert load({"store": "/o"}, {}, store="/k").store == Path("/o")  # an option wins


WRONG: tuple[tuple[str, object, str], ...] = (
    ("n_ctx", "8192", "n_ctx is a text, not an int: '8192'"),
    ("n_ctx", 8, "tokens from 16 to 16777216 (int)"),
    *(("n_ctx", value, "(int)") for value in (True, 8192.0)),
    ("allow_cpu", 1, "(bool)"),
    ("allow_cpu", "1", "is a text, not a bool"),
    ("temperature", float("nan"), "from 0 to 10 (int or float)"),
    ("temperature", "0.5", "is a text, not an int or float"),
    ("gguf_path", b"/m", "a file or folder (str or Path)"),
    ("gguf_path", "", "the path of a file"),
    ("llama_device", 0, "(str or list or tuple)"),
    ("llama_device", ["CUDA0", "CUDA0"], "each once"),
    ("gguf_repo_id", ["a/b"], "OWNER/NAME (str)"),
    ("gguf_filename", "../x", "a file's path in it"),
    ("hf_token", "s\u00e9cret", "ASCII"),
)


@pytest.mark.parametrize(("keyword", "value", "accepts"), WRONG)
def test_a_keyword_of_wrong_type_or_value_is_named(
    keyword: str, value: object, accepts: str
) -> None:
    with refused("SETTING_INVALID", SettingError) as caught:
        load(None, {}, **{keyword: value})
    assert caught.value.message.startswith(f"{keyword} is ")
    assert accepts in caught.value.message
    assert "cret" not in caught.value.render()


def test_an_unknown_keyword_lists_near_ones() -> None:
    for keyword, near in (
        ("nctx", "n_ctx"),
        ("gguf_repo", "gguf_repo_id"),
        ("devices", "llama_device"),
        ("url", "llama_cpp_url"),
        ("model", "gguf_path"),
        ("hf", "gguf_repo_id"),
        ("YAKULINGO_SPACES_N_CTX", "n_ctx"),
        ("llama_space_gguf_path", "gguf_path"),
    ):
        with refused("SETTING_UNKNOWN", SettingError) as caught:
            load(None, {}, **{keyword: 1})
        assert repr(keyword) in caught.value.message
        assert near in caught.value.message


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        *(("HF_TOKEN", one) for one in ("two words", "two\nlines", "caf\u00e9", "\u6f22")),
        *(("HF_TOKEN", one) for one in ("nul\0nul", "\x1b[2J", "hf_s\u0153cret")),
        ("HF_ENDPOINT", "hf_secret"),
    ],
)
def test_a_token_that_no_header_can_carry_is_a_setting_and_never_shown(
    name: str, secret: str
) -> None:
    words = f"{name} is a text that is not shown here, which is not "
    with refused("SETTING_INVALID", SettingError, words) as caught:
        load(environ={name: secret})
    assert secret not in caught.value.message + caught.value.hint


def test_the_token_of_hf_auth_login_counts(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hf_stored\n")
    home = {"HF_HOME": str(tmp_path)}
    for folder in (".cache", "xdg"):
        (tmp_path / folder / "huggingface").mkdir(parents=True)
        (tmp_path / folder / "huggingface/token").write_text(f"hf_{folder.strip('.')}")
    for environ, token in (
        (home, "hf_stored"),
        (home | {"HF_TOKEN": "hf_given"}, "hf_given"),
        (home | {"HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}, None),
        ({"HF_TOKEN_PATH": str(tmp_path / "token")}, "hf_stored"),
        ({"HOME": str(tmp_path)}, "hf_cache"),
        ({"HOME": str(tmp_path / "xdg")}, None),
        ({"XDG_CACHE_HOME": f"{tmp_path}/xdg"}, "hf_xdg"),
        # its old name
        ({"HUGGING_FACE_HUB_TOKEN": "hf_old"}, "hf_old"),
        ({"HUGGING_FACE_HUB_TOKEN": "hf_old", "HF_TOKEN": "hf_new"}, "hf_new"),
        ({"HUGGING_FACE_HUB_TOKEN": " "}, None),
    ):
        assert load(environ=environ).hf_token == token
    (tmp_path / "token").write_text("hf_s\u00e9cret")
    with pytest.raises(SettingError, match="not shown here") as caught:
        load(environ=home)
    assert "cret" not in caught.value.render()
    assert str(tmp_path / "token") in caught.value.message


@pytest.mark.parametrize("kind", ["fifo", "endless", "folder", "sparse"])
@pytest.mark.parametrize("variable", ["HF_HOME", "HF_TOKEN_PATH"])
def test_token_file_that_is_no_small_regular_file_is_refused(
    variable: str, kind: str, tmp_path: Path
) -> None:
    """A FIFO would hang the start for ever, /dev/zero take all memory."""
    place = tmp_path / "token"
    not_small(place, kind, tmp_path / "elsewhere")
    with refused("SETTING_INVALID", SettingError) as caught:
        load(environ={variable: str(tmp_path if variable == "HF_HOME" else place)})
    assert str(place) in caught.value.message
    assert load(environ={"HF_HOME": str(tmp_path), "HF_TOKEN": "hf_x"}).hf_token == "hf_x"
    link, secret = tmp_path / "link", tmp_path / "data"  # as a mounted secret is
    link.symlink_to("data")
    secret.write_text("hf_mounted")
    assert load(environ={"HF_TOKEN_PATH": str(link)}).hf_token == "hf_mounted"


@pytest.mark.parametrize("home", ["$PLACE", "${PLACE}", "~"])
def test_hubs_folders_are_expanded_as_its_client_does(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("hf_stored")
    for name in ("HF_TOKEN", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, text in {
        "PLACE": str(tmp_path),
        "HOME": str(tmp_path),
        "HF_HOME": f"{home}/x",
    }.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setenv("HF_TOKEN_PATH", f"{home}/token")
    assert load().store == tmp_path / "x/llama-loader"
    assert load().hf_token == "hf_stored"


def test_variables_that_are_no_settings_are_noted_with_near_ones() -> None:
    unknown = {
        "LLAMA_SPACES_N_CTX": "N_CTX",
        "LLAMA_SPACE_GUFF_PATH": "GGUF_PATH",
        "YAKULINGO_HF_TOKEN": "HF_TOKEN",
        "YAKULINGO_SPACES_HF_TOKN": "HF_TOKEN",
        "YAKULINGO_SPACES_NCTX": "N_CTX",
        "YAKULINGO_SPACES_XYZZY": "NONE",
        "YAKULINGO_SPACE_ALLOW_CPU": "ALLOW_CPU",
    }
    known = {"YAKULINGO_SPACES_N_CTX": "4096", "LLAMA_SPACE_OFFLINE": "1", "LLAMA_ARG_N_CTX": "1"}
    empty = {"YAKULINGO_SPACES_EMPTY": " "}
    notes = load(environ={**dict.fromkeys(unknown, "hf_secret"), **known, **empty}).unknown
    assert {note.code for note in notes} == {"SETTING_UNKNOWN"}
    for note, (name, near) in zip(notes, unknown.items(), strict=True):
        assert note.message.startswith(f"{name} is no setting")
        assert f"near ones: {near}" in note.message
        assert "secret" not in note.message


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_for_the_hub_s_client_is_offline_for_the_loader(name: str) -> None:
    assert load(environ={name: "1"}).offline is True
    assert load(environ={name: "off"}).offline is False


def test_the_store_is_under_hf_home_else_in_the_cache() -> None:
    for environ, store in (
        ({"HF_HOME": "/data/hf"}, "/data/hf/llama-loader"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/llama-loader"),
        ({"HOME": "/h"}, "/h/.cache/llama-loader"),
    ):
        assert load(environ=environ).store == Path(store)
    assert load({"store": "here"}, {}).store == Path.cwd() / "here"


def test_user_without_home_and_passwd_has_no_store_in_a_folder_called_tilde(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])  # a KeyError, as for uid 12345
    assert load(environ={}).store == Path("/.cache/llama-loader")


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


def test_only_settings_reads_the_environment_and_only_processes_starts_programs() -> None:
    for path in sorted(LOADER.rglob("*.py")):
        text = path.read_text()
        assert path.name == "settings.py" or not re.search(r"\bos\.(environ|getenv)", text), path
        # server.py imports it for its types alone
        starts = re.search(r"^import subprocess", text, re.MULTILINE)
        assert path.name == "processes.py" or not starts, path
