"""The way to the server and back: one host, no redirects, no proxies, a bounded answer.

The `openai` client runs on top of this transport. It alone knows the API key; it sends the headers
of a short list (the client adds some of its own, others come from environment variables), to the
base URL's host only, and counts what comes back.
"""

import ipaddress
from collections.abc import AsyncIterator
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx2

from data_pipeline.llm.secrets import Secret

OPENAI_HOST = "api.openai.com"
MAX_BODY_BYTES = 8 * 2**20  # a completion of 8,192 tokens is some 40 kB
_HEADERS = {
    *("accept", "connection", "content-length", "content-type", "host", "idempotency-key"),
    *("transfer-encoding", "user-agent"),
}
_OPENAI_HEADERS = {"openai-organization", "openai-project"}


@dataclass(frozen=True)
class BaseUrl:
    """Where the server is.

    Attributes:
        url: such as `https://api.openai.com/v1`, without a slash at the end.
        scheme: `https`, or `http` on this machine.
        host: in lower case.
        port: also where the URL leaves it out.
        loopback: whether it is this machine.
    """

    url: str
    scheme: str
    host: str
    port: int
    loopback: bool


def parse_base_url(text: str) -> BaseUrl:
    """Check a base URL.

    Raises:
        ValueError: it is not an http(s) URL, names a user, a query or a fragment, or is not
            encrypted although it leads to another machine.
    """
    # A URL that is refused is not quoted: it may hold a password.
    try:
        parts = urlsplit(text)
        host, port = (parts.hostname or "").lower(), parts.port
    except ValueError:
        raise ValueError("`base_url`: not a URL") from None
    if parts.scheme not in ("http", "https") or not host or not text.isascii():
        raise ValueError("`base_url`: expected https://HOST[:PORT]/PATH, such as .../v1")
    if any(character.isspace() or character == "\\" for character in text):
        raise ValueError("`base_url`: holds white space or a backslash")
    if parts.username is not None or parts.password is not None:
        raise ValueError(
            "`base_url`: holds a user name or password; keys come from the environment or a file"
        )
    if "?" in text or "#" in text:
        raise ValueError("`base_url`: holds a query or fragment")
    loopback = _is_loopback(host)
    if parts.scheme == "http" and not loopback:
        raise ValueError(f"`base_url`: {host} is another machine: https is needed")
    return BaseUrl(
        url=text.rstrip("/"),
        scheme=parts.scheme,
        host=host,
        port=port or {"http": 80, "https": 443}[parts.scheme],
        loopback=loopback,
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class UnfitAnswer(httpx2.TransportError):
    """The server's answer is not read (further): too long, or encoded."""


class _BoundedStream(httpx2.AsyncByteStream):
    """The bytes of an answer, up to a limit."""

    def __init__(self, stream: httpx2.AsyncByteStream, limit: int) -> None:
        self._stream = stream
        self._limit = limit

    async def __aiter__(self) -> AsyncIterator[bytes]:
        seen = 0
        async for chunk in self._stream:
            seen += len(chunk)
            if seen > self._limit:
                raise UnfitAnswer(f"the answer is longer than {self._limit} bytes")
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()


class GuardedTransport(httpx2.AsyncBaseTransport):
    """Sends to one host, with the key, and bounds what comes back.

    Args:
        base: the only host, port and scheme that are allowed.
        key: the API key, None to send none.
        connections: how many to keep open.
        max_body: longest answer in bytes.
    """

    def __init__(self, base: BaseUrl, key: Secret | None, connections: int, max_body: int) -> None:
        self._base = base
        self._key = key
        self._max_body = max_body
        limits = httpx2.Limits(
            max_connections=connections + 1, max_keepalive_connections=connections + 1
        )
        self._inner = httpx2.AsyncHTTPTransport(trust_env=False, limits=limits)
        self._allowed = _HEADERS | (_OPENAI_HEADERS if base.host == OPENAI_HOST else set())

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request on.

        Raises:
            UnfitAnswer: the answer is too long, or compressed although that was not asked for: a
                small answer could then unpack to a huge one.
        """
        url = request.url
        default = {"http": 80, "https": 443}.get(url.scheme)
        assert (url.scheme, url.host, url.port or default) == (
            self._base.scheme,
            self._base.host.strip("[]"),
            self._base.port,
        ), "a request must not leave the base URL's host"
        headers = [
            (name, value)
            for name, value in request.headers.raw
            if name.decode("ascii").lower() in self._allowed
        ]
        headers.append((b"Accept-Encoding", b"identity"))
        if self._key is not None:
            headers.append((b"Authorization", b"Bearer " + self._key.reveal().encode("ascii")))
        response = await self._inner.handle_async_request(
            httpx2.Request(
                request.method,
                url,
                headers=headers,
                stream=request.stream,
                extensions=request.extensions,
            )
        )
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        if response.headers.get("content-encoding", "identity") != "identity":
            await response.aclose()
            raise UnfitAnswer("the answer is compressed, which was not asked for")
        response.stream = _BoundedStream(response.stream, self._max_body)
        return response

    async def aclose(self) -> None:
        """Close the connections."""
        await self._inner.aclose()
