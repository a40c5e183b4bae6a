"""The frames between a program under test and its judge, as a hostile peer sends them."""

import socket

import pytest

from data_pipeline.sandbox.plain_values import MAX_FRAME_BYTES, BadFrame, receive, send


def test_frames_arrive_whole() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        for message in (None, [1, "two", {"three": 3.5}], "x" * 1000):
            send(theirs, message)
            assert receive(ours) == message


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ((MAX_FRAME_BYTES + 1).to_bytes(4, "big"), f"a frame of {MAX_FRAME_BYTES + 1} bytes"),
        (b"\xff\xff\xff\xff", "a frame of 4294967295 bytes"),
        (b"\0\0", "the connection ended"),
        (b"\0\0\0\5null", "the connection ended"),
        (b"\0\0\0\4nul!", "not JSON"),
        (b"\0\1\x86\xa0" + b"[" * 100_000, "not JSON"),
        (b"\0\0\0\2\xff\xfe", "not JSON"),
    ],
)
def test_what_is_no_frame_is_refused(sent: bytes, message: str) -> None:
    """A length that is too large is refused before a byte of it is awaited or held."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(sent)
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(BadFrame, match=message):
            receive(ours)


def test_a_value_that_is_too_large_is_not_sent() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, pytest.raises(ValueError, match="too large"):
        send(theirs, "x" * MAX_FRAME_BYTES)
