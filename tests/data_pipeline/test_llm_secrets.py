"""API keys: where they may come from, and that no form of them gets out."""

import base64
import io
import logging
import pickle
import traceback
from pathlib import Path
from urllib.parse import quote

import pytest

pytest.importorskip("openai")

from data_pipeline.llm.secrets import Redactor, Secret, guarded, read_key
from data_pipeline.llm.transport import parse_base_url
from megaphi.errors import RunError

KEY = "sk-test/+Zq81=kdjf83hfKE"


@pytest.mark.parametrize(
    "form",
    [
        KEY,
        KEY.lower(),
        quote(KEY, safe=""),
        KEY.encode().hex(),
        base64.b64encode(KEY.encode()).decode(),
        base64.b64encode(f"user:{KEY}".encode()).decode(),
        base64.b64encode(f"Bearer {KEY} and more".encode()).decode(),
        base64.urlsafe_b64encode(f"Bearer: {KEY}??".encode()).decode(),
    ],
)
def test_every_form_is_redacted(form: str) -> None:
    redact = Redactor([Secret(KEY)])
    text = redact(f"before {form} after")
    assert "[API key]" in text
    assert KEY[8:18].lower() not in text.lower()
    assert text.startswith("before ")
    assert text.endswith(" after")
    assert redact.finds(form)
    assert not redact.finds(text)


def test_a_secret_does_not_print() -> None:
    secret = Secret(KEY)
    assert (
        KEY not in f"{secret} {secret!r} {[secret]} {vars if hasattr(secret, '__dict__') else ''}"
    )
    with pytest.raises(TypeError):
        pickle.dumps(secret)


def test_log_records_and_tracebacks_are_redacted() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger = logging.getLogger("some.library")
    logger.addHandler(handler)
    try:
        with guarded(Redactor([Secret(KEY)])):
            logger.error("headers %s", {"Authorization": f"Bearer {KEY}"})
            try:
                raise OSError(f"cannot send Bearer {KEY}")
            except OSError:
                logger.exception("failed")
    finally:
        logger.removeHandler(handler)
    text = stream.getvalue()
    assert KEY not in text
    assert text.count("[API key]") == 2
    assert "OSError: cannot send" in text
    assert logging.getLogRecordFactory() is logging.LogRecord


def fail(inner: str, outer: str) -> None:
    try:
        raise OSError(inner)
    except OSError as error:
        raise ValueError(outer) from error


def test_an_exception_that_quotes_a_key_is_replaced() -> None:
    redact = Redactor([Secret(KEY)])
    with pytest.raises(RunError) as caught, guarded(redact):
        fail(f"inner {KEY}", "outer")
    assert KEY not in "".join(traceback.format_exception(caught.value))
    with pytest.raises(ValueError, match="harmless"), guarded(redact):
        fail("inner", "harmless")


def test_where_keys_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_KEY", f" {KEY}\n")
    monkeypatch.delenv("NO_KEY", raising=False)
    found = read_key("SOME_KEY", None)
    assert found is not None
    assert found.reveal() == KEY
    assert read_key("NO_KEY", None) is None
    file = tmp_path / "key"
    file.write_text(KEY + "\n")
    file.chmod(0o640)
    with pytest.raises(ValueError, match="chmod 600"):
        read_key(None, file)
    file.chmod(0o600)
    found = read_key("NO_KEY", file)
    assert found is not None
    assert found.reveal() == KEY
    for bad in ("short", "two words-of-a-key", "new\nline-in-the-key", "ümlaut-key-key"):
        file.write_text(bad)
        with pytest.raises(ValueError, match="API key") as caught:
            read_key(None, file)
        assert bad not in str(caught.value)
    with pytest.raises(FileNotFoundError):
        read_key(None, tmp_path / "absent")


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/v1",
        "https://user:passw0rd@example.com/v1",
        "https://example.com/v1?key=passw0rd",
        "https://example.com/v1#passw0rd",
        "https://example.com\\@passw0rd/v1",
        "https://example.com/v1\npassw0rd",
        "ftp://example.com/passw0rd",
        "example.com/passw0rd",
        "https:///passw0rd",
        "https://example.com:99999/passw0rd",
        "http://127.0.0.1.example.com/passw0rd",
        "http://0.0.0.0/passw0rd",
        "https://exämple.com/passw0rd",
        "https://[::1/passw0rd",
    ],
)
def test_base_urls_that_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="base_url") as caught:
        parse_base_url(url)
    assert "passw0rd" not in str(caught.value)


def test_base_urls_that_are_taken() -> None:
    for url, host, port in (
        ("https://api.openai.com/v1/", "api.openai.com", 443),
        ("http://localhost:8000/v1", "localhost", 8000),
        ("http://127.0.0.1/v1", "127.0.0.1", 80),
        ("http://[::1]:9/v1", "::1", 9),
    ):
        base = parse_base_url(url)
        assert (base.host, base.port) == (host, port)
        assert base.url == url.rstrip("/")
