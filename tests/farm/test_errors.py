"""Each sentence of ``farm/sentences.json`` is used, and gets exactly its values where it is."""

import ast
import copy
from pathlib import Path

from farm import errors
from farm.errors import FarmError, UsageError
from tests.rigs.sentences import says_nothing, uses, values

SENTENCES = errors._SENTENCES
SOURCES = sorted(Path(errors.__file__).parent.rglob("*.py"))


def test_each_sentence_gets_exactly_its_values_where_an_error_is_made() -> None:
    found = 0
    for call, names, given in uses(SOURCES):
        made = ast.unparse(call.func)
        if made.endswith(("Error", "super().__init__")):
            found += 1
            assert names <= SENTENCES.keys(), made
            assert "hint" in given or all("hint" in SENTENCES[name] for name in names), names
            needed = [values(SENTENCES[name]) for name in names]
            assert set().union(*needed) == given - {"hint", "log"}, names
    assert found > 200


def test_each_note_gets_exactly_its_values() -> None:
    made = [one for one in uses(SOURCES) if ast.unparse(one[0].func) == "remark"]
    for _, names, given in made:
        assert [name for name in names if values(SENTENCES[name]) != given] == []
    assert len(made) > 40
    assert errors.remark("KEY_READABLE", file="a") == (
        "note[KEY_READABLE]: others may read a: chmod 600 a"
    )


def test_each_sentence_is_said_somewhere() -> None:
    source = "".join(path.read_text("utf-8") for path in SOURCES)
    assert [name for name in SENTENCES if f'"{name}"' not in source] == []
    assert [name for name, told in SENTENCES.items() if says_nothing(told)] == []


def test_case_is_no_part_of_the_code_and_an_error_can_be_sent_to_another_host() -> None:
    error = UsageError("KEY_MISSING/file", file="a.key", strerror="No such file")
    assert error.render().startswith("error[KEY_MISSING]: key file a.key cannot be read: No such")
    assert "\nhint: --key takes" in error.render()
    again = copy.copy(error)  # as pickle does
    assert (type(again), again.render()) == (UsageError, error.render())
    assert FarmError("KEY_MISSING", hint="find it").hint == "find it"


def test_certificate_of_a_proxy_is_answered_with_the_variables_that_name_its_authority() -> None:
    said = "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: self-signed certificate"
    error = FarmError("RELEASE_UNREACHABLE", name="manifest.json", problems=said)
    assert error.hint.endswith("SSL_CERT_FILE and REQUESTS_CA_BUNDLE")
