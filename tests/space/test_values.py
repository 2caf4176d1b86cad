import inspect
import re

import llama_space
from llama_loader import doctor, report, selection
from llama_loader.errors import SettingError
from llama_loader.events import Downloading
from llama_space.values import Address, Failure, Record

SECRET = "https://hub/file?Signature=abc"


def test_later_news_take_the_place_of_the_earlier() -> None:
    record = Record()
    for event in (Downloading("a", 1, 2), Downloading("b", 1, 2), Downloading("a", 2, 2)):
        record.hear(event)
    latest = record.status().progress
    assert latest is not None
    assert latest.text == "downloading a: 2 B of 2 B (100%)"


def test_a_value_shows_no_secrets_and_an_error_has_one_line() -> None:
    assert "secret" not in repr(Address("http://127.0.0.1:1/v1", "secret"))
    failure = Failure.of(SettingError("BAD", f"two\nlines of {SECRET}", hint=f"see {SECRET}"))
    assert failure == Failure("BAD", "two lines of https://hub/file?…", "see https://hub/file?…", 2)


def test_class_that_a_page_is_made_of_has_in_its_docstring_what_its_fields_mean() -> None:
    """``docs/conf.py`` and the doctor's schema are made of docstrings, and of no comments."""
    known = {**vars(selection), **vars(report), **vars(doctor)}
    kinds = [known[name] for name in doctor.json_schema()["$defs"]]
    for kind in (*kinds, *(getattr(llama_space, name) for name in llama_space.__all__)):
        assert not re.findall(r"^    (?:\w+: .*  )?# .*", inspect.getsource(kind), re.MULTILINE)
