"""``engine.server()`` with the client that other people's apps use."""

import openai
import pytest

from llama_space import Engine

pytestmark = [pytest.mark.model, pytest.mark.timeout(600)]


def test_openai_client_streams_from_the_engines_server(engine: Engine) -> None:
    with engine.server() as address:
        client = openai.OpenAI(base_url=address.base_url, api_key=address.api_key)
        stream = client.chat.completions.create(
            model="any",
            messages=[{"role": "user", "content": "What is the capital of France?"}],
            max_tokens=16,
            temperature=0,
            stream=True,
        )
        pieces = [one.choices[0].delta.content or "" for one in stream if one.choices]
    assert len(pieces) > 3
    told = engine.chat(
        [{"role": "user", "content": "What is the capital of France?"}],
        max_tokens=16,
        temperature=0,
    )
    assert "".join(told) == "".join(pieces)
