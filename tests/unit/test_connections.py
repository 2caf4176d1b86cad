"""Every wait has an end: addresses share the time, every read is told to the watch."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from llama_loader import connections

ADDRESSES = ["192.0.2.1", "192.0.2.2", "192.0.2.3"]


class Clock:
    """A watch that has so many seconds left, and keeps what it is told."""

    def __init__(self, left: float = 9.0) -> None:
        self.seconds = left
        self.told: list[int] = []

    def left(self) -> float:
        return self.seconds

    def waited(self, seconds: float, count: int) -> None:
        assert 0 <= seconds < 60
        self.told.append(count)


class Socket:
    """Stands for one that is connected; keeps what is set on it."""

    def __init__(self, timeout: float | None = 5.0) -> None:
        self.timeout = timeout
        self.set: list[Any] = []

    def gettimeout(self) -> float | None:
        return self.timeout

    def settimeout(self, seconds: float) -> None:
        self.set.append(seconds)

    def setsockopt(self, *option: int) -> None:
        self.set.append(option)


class Network:
    """Stands for the resolver and the network: which addresses there are, and which answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *answering: str) -> None:
        self.names: list[tuple[str, int]] = []
        self.tried: list[tuple[str, int, float]] = []
        self.addresses = ADDRESSES
        self.made = Socket()
        self._answering = answering
        monkeypatch.setattr(connections.socket, "getaddrinfo", self.look_up)
        monkeypatch.setattr(connections.socket, "create_connection", self.connect)

    def look_up(self, host: str, port: int, **kind: Any) -> list[tuple[Any, ...]]:
        assert kind == {"type": socket.SOCK_STREAM}
        self.names.append((host, port))
        return [(2, 1, 6, "", (address, port)) for address in self.addresses]

    def connect(self, place: tuple[str, int], seconds: float) -> Socket:
        self.tried.append((*place, seconds))
        if place[0] not in self._answering:
            raise ConnectionRefusedError(111, place[0])
        return self.made


def connection(host: str = "release.invalid", timeout: float | None = 8.0) -> tuple[Any, Clock]:
    watch = Clock()
    pool = connections._pools(watch)["http"]
    made: Any = pool.ConnectionCls(host, 8080, timeout=timeout, socket_options=[(6, 1, 1)])
    return made, watch


def test_each_address_gets_its_share_of_the_time_that_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = Network(monkeypatch, ADDRESSES[2])
    made, _ = connection()
    assert made._new_conn() is network.made
    assert network.names == [("release.invalid", 8080)]
    assert network.tried == [
        ("192.0.2.1", 8080, 3.0),  # a third of nine seconds
        ("192.0.2.2", 8080, 4.5),
        ("192.0.2.3", 8080, 8.0),  # and never more than the timeout
    ]
    assert network.made.set == [(6, 1, 1), 8.0]


def test_the_first_that_answers_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network(monkeypatch, *ADDRESSES)
    made, watch = connection(timeout=2.0)
    watch.seconds = 1.5
    made._new_conn()
    assert network.tried == [("192.0.2.1", 8080, 0.5)]
    assert network.made.set[-1] == 1.5


def test_the_last_ones_error_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network(monkeypatch)
    with pytest.raises(ConnectionRefusedError, match=r"192\.0\.2\.3"):
        connection()[0]._new_conn()
    assert len(network.tried) == 3


def test_a_name_without_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    Network(monkeypatch).addresses = []
    with pytest.raises(OSError, match=r"^release\.invalid has no address$"):
        connection()[0]._new_conn()


def test_an_address_of_version_6_is_looked_up_without_its_brackets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = Network(monkeypatch, *ADDRESSES)
    connection("[2001:db8::1]")[0]._new_conn()
    assert network.names == [("2001:db8::1", 8080)]


def test_what_is_no_name_is_the_networks_fault_and_quoted_in_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise UnicodeError("label too long")

    monkeypatch.setattr(connections.socket, "getaddrinfo", refuse)
    with pytest.raises(OSError, match=r"^'x{80}' is no host's name$"):
        connection("x" * 200)[0]._new_conn()


class Raw:
    """What a socket's file reads; ends with an error where it is told to."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = list(pieces)
        self.closed = False

    def readinto(self, buffer: Any) -> int | None:
        if not self.pieces:
            raise TimeoutError
        piece = self.pieces.pop(0)
        buffer[: len(piece)] = piece
        return len(piece) or None

    def close(self) -> None:
        self.closed = True


def reads(*pieces: bytes, silence: float | None = 5.0) -> tuple[Any, Socket, Clock, Raw]:
    raw, sock, watch = Raw(*pieces), Socket(silence), Clock()
    made: Any = connections._Reads(raw, sock, watch)  # type: ignore[arg-type]
    return made, sock, watch, raw


def test_every_read_is_told_also_one_that_fails() -> None:
    made, _, watch, _ = reads(b"abc", b"")
    assert made.readable()
    buffer = bytearray(10)
    assert made.readinto(buffer) == 3
    assert buffer[:3] == b"abc"
    assert made.readinto(buffer) == 0
    with pytest.raises(TimeoutError):
        made.readinto(buffer)
    assert watch.told == [3, 0, 0]


def test_a_read_waits_no_longer_than_is_left_and_asks_the_system_only_for_changes() -> None:
    made, sock, watch, _ = reads(*[b"x"] * 6)
    for left in (9.0, 4.0, 4.0, 6.0, 0.0, 0.0):
        watch.seconds = left
        made.readinto(bytearray(1))
    assert sock.set == [4.0, 5.0, 0.001]  # 0 would mean not to wait at all


def test_a_socket_that_does_not_wait_is_given_a_moment() -> None:
    made, sock, _, _ = reads(b"x", silence=0.0)
    made.readinto(bytearray(1))
    assert sock.set == []
    assert made._silence == 0.001


def test_closing_closes_what_it_reads_from_and_itself() -> None:
    made, _, _, raw = reads()
    made.close()
    assert raw.closed
    assert made.closed


@pytest.mark.parametrize("proxy", ["http://proxy.invalid:3128", "https://proxy.invalid"])
def test_what_comes_through_a_proxy_is_watched_too(proxy: str) -> None:
    watch = Clock()
    adapter = connections.Watched(watch)
    for manager in (adapter.poolmanager, adapter.proxy_manager_for(proxy)):
        pools = manager.pool_classes_by_scheme
        assert set(pools) == {"http", "https"}
        assert all(pool.ConnectionCls.watch is watch for pool in pools.values())
        assert all(pool.ConnectionCls.response_class.watch is watch for pool in pools.values())
