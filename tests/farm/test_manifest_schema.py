"""The JSON schema that is published beside a manifest, made from the loader's own definition."""

import copy
import json
from typing import Any

import jsonschema
import pytest

from farm.release import json_schema
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
