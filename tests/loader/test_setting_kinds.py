"""Each kind of setting takes what it accepts and refuses the rest in words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_loader import settings
from llama_loader.errors import LoaderError, SettingError
from llama_loader.settings import PREFIX, load

BAD = {
    "BACKEND": ["transformers"],
    "LLAMA_CPP_MANIFEST_URL": ["ftp://example.org/m.json", "manifest.json"],
    "LLAMA_CPP_MANIFEST_SHA256": ["abc"],
    "LLAMA_DEVICE": ["0", "CUDA0,,CUDA1", "CUDA0,CUDA0", "CUDA0, cuda0", "auto,CUDA0", "cpu,CUDA0"],
    "N_GPU_LAYERS": ["-2", "all", "1e3"],
    "ALLOW_CPU": ["maybe"],
    "GGUF_REPO_ID": ["https://huggingface.co/a/b", "without-owner"],
    "GGUF_PATH": ["~nobody-of-that-name/m.gguf"],
    "GGUF_FILENAME": ["../../etc/passwd"],
    "N_CTX": ["0", "٤٠٩٦", "4_096"],
    "TEMPERATURE": ["nan", "-0.1"],
    "MAX_NEW_TOKENS": ["0"],
    "LLAMA_SERVER_PORT": ["65536", "0"],
    "LOAD_THREADS": ["33", "-1", "many"],
    "LLAMA_SERVER_STARTUP_TIMEOUT": ["0", "inf"],
    "ZEROGPU_SIZE": ["medium"],
    "ZEROGPU_DURATION": ["-1"],
    "CUDA_ARCH": ["hopper"],
    "OFFLINE": ["2"],
}


BAD_OF_THE_HUB = {
    **{key: ["maybe"] for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "SPACES_ZERO_GPU")},
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": ["maybe"],
    **{key: ["~nobody-of-that-name/x"] for key in ("HF_HOME", "HF_TOKEN_PATH", "XDG_CACHE_HOME")},
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for names in ({PREFIX + name: values for name, values in BAD.items()}, BAD_OF_THE_HUB)
        for name, values in names.items()
        for value in values
    ],
)
def test_what_cannot_be_parsed_names_the_variable_and_what_it_accepts(
    name: str, value: str
) -> None:
    with pytest.raises(SettingError) as caught:
        load(environ={name: value})
    assert caught.value.exit_status == 2
    assert f"{name} is {value!r}, which is not " in caught.value.message
    assert "default" in caught.value.hint


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
