"""A small HTTP storage as ccache wants it: GET, HEAD, PUT and DELETE of whole objects, in memory.

With ``token`` it refuses whoever does not bring it; with ``refuse`` it answers 503 to everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tests.rigs import http_served
from tests.rigs.http_served import Answer, Request


class ObjectStorage:
    """Listens on loopback. ``asked`` has the method and the status of every request."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.asked: list[tuple[str, int]] = []
        self.token = ""
        self.refuse = False
        self.write_only = False
        self._address = ""

    @contextmanager
    def serve(self) -> Iterator[ObjectStorage]:
        """Serve until the context is left."""
        with http_served.serving(self._answer) as self._address:
            yield self

    def url(self, **attributes: str) -> str:
        """Return the address in ccache's words: ``http://…/|name=value``."""
        extra = "".join(f"|{name}={value}" for name, value in attributes.items())
        return f"{self._address}/objects/{extra}"

    def count(self, method: str, status: int) -> int:
        """Return how many requests of a kind got this answer."""
        return self.asked.count((method, status))

    def _answer(self, asked: Request) -> Answer:
        answer = self._decide(asked)
        self.asked.append((asked.method, answer.status))
        return answer

    def _decide(self, asked: Request) -> Answer:
        if self.refuse:
            return Answer(503)
        if self.token and asked.headers.get("Authorization") != f"Bearer {self.token}":
            return Answer(401)
        if asked.method == "PUT":
            self.objects[asked.path] = asked.body
            return Answer(201)
        if asked.path not in self.objects or (self.write_only and asked.method == "GET"):
            return Answer(404)
        if asked.method == "DELETE":
            del self.objects[asked.path]
            return Answer(204)
        return Answer(200, self.objects[asked.path])
