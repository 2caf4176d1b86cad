"""The JSON schema that is published beside a manifest, made from the loader's own definition."""

from __future__ import annotations

import copy
import json
import re
from typing import Any

import jsonschema
import pytest

from farm.release import json_schema
from farm.tarball.archive import Chunking
from tests.rigs import archives

_, ARTIFACT = archives.release()
GOOD: dict[str, Any] = json.loads(archives.manifest(ARTIFACT))


@pytest.mark.parametrize(
    "changes", [{}, {"kind": "cuda-runtime", "provides": ["libllama.so.0"]}, {"of_tomorrow": 1}]
)
def test_a_good_manifest_is_of_the_schema(changes: dict[str, Any]) -> None:
    tree = copy.deepcopy(GOOD)
    tree["artifacts"][0].update(changes)
    jsonschema.validate(tree, json_schema())


@pytest.mark.parametrize(
    "changes", [{"size": -1}, {"sha256": "0" * 63}, {"name": "../x"}, {"files": []}]
)
def test_what_the_loader_refuses_is_not_of_the_schema(changes: dict[str, Any]) -> None:
    tree = copy.deepcopy(GOOD)
    tree["artifacts"][0].update(changes)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(tree, json_schema())


def test_the_schema_says_which_it_is() -> None:
    schema = json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["title"] == "llama-server release manifest"
    patterns = set(re.findall(r'"pattern": "(.*?)"[,}]', json.dumps(schema)))
    assert "^[0-9a-f]{64}$" in patterns
    assert all(pattern.startswith("^") and pattern.endswith("$") for pattern in patterns)


def test_artifacts_and_files_are_cut_into_pieces_that_old_loaders_know() -> None:
    assert Chunking() == Chunking(524_288, 4_194_304)
