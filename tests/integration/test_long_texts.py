"""A text longer than the context, translated by a real model: slowly, badly, and in its form."""

import pytest

from llama_space import Engine
from translator.session import Answer, Job, translate

pytestmark = [pytest.mark.model, pytest.mark.timeout(900)]

SENTENCES = (
    "The garden behind the house was full of old apple trees.",
    "Every morning my grandmother walked down to the river.",
    "Nobody in the village remembered who had built the bridge.",
)
TEXT = f"""# The garden

{SENTENCES[0]} {SENTENCES[1]} {SENTENCES[2]} {SENTENCES[0]} {SENTENCES[1]} {SENTENCES[2]}
See https://example.com/a?b=c for `more`.

- {SENTENCES[1]}
  - {SENTENCES[2]}

| Name | Age |
|------|-----|
| Anna | 12  |

```python
print("kept")
```
{SENTENCES[0]}
"""


def answers(engine: Engine, text: str, done: list[str]) -> list[Answer]:
    job = Job(text, "en", "de")
    updates = list(translate(engine, engine.settings, job, done=done))
    assert isinstance(updates[-1], Answer), updates[-1]
    return [one for one in updates if isinstance(one, Answer)]


def test_real_model_translates_a_long_text_in_pieces_and_keeps_its_form(engine: Engine) -> None:
    done: list[str] = []
    made = answers(engine, TEXT, done)
    text, source = made[-1].text, TEXT.splitlines()
    assert made[-1].count == len(done) > 2
    lines = text.splitlines()
    assert len(lines) == len(source)
    assert [one.strip() == "" for one in lines] == [one.strip() == "" for one in source]
    assert lines[0].startswith("# ")
    assert [one.partition("-")[0] for one in lines[5:7]] == ["", "  "]
    assert "https://example.com/a?b=c" in text
    assert "`more`" in text
    assert [one.count("|") for one in lines[8:11]] == [3, 3, 3]
    assert lines[9] == "|------|-----|"
    assert '```python\nprint("kept")\n```' in text
    assert text != TEXT
    resumed = answers(engine, TEXT, done[:2])
    assert resumed[0].done == 2
    assert resumed[0].text.startswith(f"# {done[0]}")
    assert len(resumed[-1].text.splitlines()) == len(source)
