"""Keys and rates: who may ask, and how often."""

import hashlib
import logging
from pathlib import Path
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI, Request
from fastapi.testclient import TestClient

from app.__main__ import main
from app.error_handlers import add_error_handlers
from app.keys import KeyRing, new_key, read_keys, require_admin_key, require_key
from app.metrics import Metrics
from app.rate_limit import RateLimiter, limit_rate
from rlhf.errors import ConfigError, UsageError

HASH_OF_ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
"""sha256 of `abc`, from FIPS 180-2, appendix B.1."""


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"# who may ask\n\nbob:{HASH_OF_ABC}  # since May\n")
    return path


def line(name: str, key: str) -> str:
    return f"{name}:{hashlib.sha256(key.encode()).hexdigest()}\n"


def test_a_key_is_known_by_its_hash(keys_file: Path) -> None:
    ring = KeyRing(keys_file)
    assert ring.identify("abc") == "bob"
    assert [ring.identify(wrong) for wrong in ("", "ab", "abcd", "bob", HASH_OF_ABC, "é")] == [None] * 6


def test_every_hash_is_compared_whichever_matches(keys_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys_file.write_text(line("first", "1") + line("second", "2") + line("third", "3"))
    ring, compared = KeyRing(keys_file), []
    monkeypatch.setattr("app.keys.hmac.compare_digest", lambda a, b: compared.append(b) or a == b)
    assert ring.identify("1") == "first"
    assert len(compared) == 3


def test_a_name_may_have_two_keys_so_that_one_can_be_replaced(keys_file: Path) -> None:
    keys_file.write_text(line("bob", "old") + line("bob", "new"))
    assert (KeyRing(keys_file).identify("old"), KeyRing(keys_file).identify("new")) == ("bob", "bob")


def test_a_new_key_fits_its_line(tmp_path: Path) -> None:
    key, made = new_key("web.1")
    (tmp_path / "keys").write_text(made)
    assert KeyRing(tmp_path / "keys").identify(key) == "web.1"
    assert key != new_key("web.1")[0]
    with pytest.raises(UsageError, match=r"'a:b' is no name for a key"):
        new_key("a:b")


def test_the_command_keeps_key_and_line_apart(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["new-key", "web"]) == 0
    printed = capsys.readouterr()
    (tmp_path / "keys").write_text(printed.out)
    assert KeyRing(tmp_path / "keys").identify(printed.err.split()[-1]) == "web"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"holds no key"),
        ("# nobody\n", r"holds no key"),
        (f"bob:{HASH_OF_ABC}\nplain-key\n", r"line 2 is not name:sha256"),
        (f"bob:{HASH_OF_ABC[1:]}\n", r"line 1 is not name:sha256"),
        (f"b ob:{HASH_OF_ABC}\n", r"line 1 is not name:sha256"),
        ("\udcff", r"cannot read the keys"),
    ],
)
def test_a_broken_file_is_named_and_a_key_in_it_is_not_told(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(text, errors="surrogateescape")
    with pytest.raises(ConfigError, match=message) as caught:
        KeyRing(path)
    assert "plain-key" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the keys in .*keys: .*; `python -m app new-key NAME`"):
        read_keys(tmp_path / "keys")


def test_a_changed_file_is_read_again(keys_file: Path) -> None:
    ring = KeyRing(keys_file)
    keys_file.write_text(line("ann", "xyz"))
    assert (ring.identify("abc"), ring.identify("xyz")) == (None, "ann")


@pytest.mark.parametrize("breaking", ["a broken file", "no file"])
def test_a_file_that_breaks_later_leaves_the_keys_and_one_error(
    breaking: str, keys_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ring = KeyRing(keys_file)
    if breaking == "no file":
        keys_file.unlink()
    else:
        keys_file.write_text("not a key file")
    assert [ring.identify("abc") for _ in range(3)] == ["bob"] * 3
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    keys_file.write_text(line("ann", "xyz") + "# mended\n")
    assert (ring.identify("abc"), ring.identify("xyz")) == (None, "ann")


def client(keys: KeyRing | None, *, admin: KeyRing | None = None, per_minute: int = 0) -> TestClient:
    app = FastAPI()
    add_error_handlers(app, Metrics())
    limit = limit_rate(per_minute)

    @app.get("/who", dependencies=[Depends(require_key(keys)), Depends(limit)])
    async def who(request: Request) -> dict[str, Any]:
        return {"name": getattr(request.state, "key_name", None)}

    @app.post("/admin/reload")
    async def reload(allowed: Annotated[None, Depends(require_admin_key(admin))]) -> None: ...

    return TestClient(app)


@pytest.mark.parametrize(
    "headers", [{"Authorization": "Bearer abc"}, {"authorization": "bearer abc"}, {"X-API-Key": "abc"}]
)
def test_a_key_is_taken_from_either_header(headers: dict[str, str], keys_file: Path) -> None:
    assert client(KeyRing(keys_file)).get("/who", headers=headers).json() == {"name": "bob"}


@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic abc"}, {"X-API-Key": ""}]
)
def test_without_a_right_key_it_is_401(headers: dict[str, str], keys_file: Path) -> None:
    answer = client(KeyRing(keys_file)).get("/who", headers=headers)
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert answer.json()["type"] == "/problems/unauthorized"
    assert "wrong" not in answer.text


def test_without_keys_everybody_may() -> None:
    assert client(None).get("/who").json() == {"name": None}


def test_admin_is_closed_without_keys_of_its_own_and_open_to_those_only(keys_file: Path, tmp_path: Path) -> None:
    closed = client(KeyRing(keys_file)).post("/admin/reload", headers={"X-API-Key": "abc"})
    assert (closed.status_code, closed.json()["type"]) == (403, "/problems/forbidden")
    assert "APP_ADMIN_KEYS_FILE" in closed.json()["detail"]
    (tmp_path / "admin").write_text(line("root", "xyz"))
    asking = client(KeyRing(keys_file), admin=KeyRing(tmp_path / "admin"))
    assert asking.post("/admin/reload", headers={"X-API-Key": "abc"}).status_code == 401
    assert asking.post("/admin/reload", headers={"X-API-Key": "xyz"}).status_code == 200


def test_openapi_shows_how_to_send_a_key() -> None:
    schema = client(None).get("/openapi.json").json()
    assert schema["paths"]["/who"]["get"]["security"] == [{"HTTPBearer": []}, {"APIKeyHeader": []}]
    assert schema["paths"]["/admin/reload"]["post"]["security"] == [{"HTTPBearer": []}, {"APIKeyHeader": []}]
    assert schema["components"]["securitySchemes"]["APIKeyHeader"]["name"] == "X-API-Key"


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_minutes_requests_may_come_at_once_and_then_one_by_one() -> None:
    clock = Clock()
    limiter = RateLimiter(6, clock=clock)
    assert [limiter.admit("a") for _ in range(6)] == [None] * 6
    assert limiter.admit("a") == pytest.approx(10)
    assert limiter.admit("b") is None
    clock.now += 4
    assert limiter.admit("a") == pytest.approx(6)
    clock.now += 6
    assert limiter.admit("a") is None
    assert limiter.admit("a") == pytest.approx(10)


def test_idle_callers_are_forgotten() -> None:
    clock = Clock()
    limiter = RateLimiter(6, clock=clock)
    for caller in range(1000):
        limiter.admit(str(caller))
    assert len(limiter) == 1000
    clock.now += 60
    limiter.admit("a")
    assert len(limiter) == 1


def test_there_are_never_more_callers_than_fit() -> None:
    limiter = RateLimiter(1, max_callers=3, clock=Clock())
    for caller in "abcd":
        limiter.admit(caller)
    assert len(limiter) == 3
    assert limiter.admit("d") is not None


def test_too_many_requests_are_429_a_key(keys_file: Path) -> None:
    keys_file.write_text(line("bob", "1") + line("ann", "2"))
    asking = client(KeyRing(keys_file), per_minute=1)
    assert asking.get("/who", headers={"X-API-Key": "1"}).status_code == 200
    refused = asking.get("/who", headers={"X-API-Key": "1"})
    assert (refused.status_code, refused.json()["type"]) == (429, "/problems/too-many-requests")
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert asking.get("/who", headers={"X-API-Key": "2"}).status_code == 200


@pytest.mark.parametrize(
    ("second", "status"), [("192.0.2.1", 429), ("192.0.2.2", 200), ("2001:db8::2", 429), ("2001:db8:0:1::1", 200)]
)
def test_without_keys_an_address_or_an_ipv6_network_is_a_caller(second: str, status: int) -> None:
    app = client(None, per_minute=1).app
    first = "2001:db8::1" if ":" in second else "192.0.2.1"
    assert TestClient(app, client=(first, 1)).get("/who").status_code == 200
    assert TestClient(app, client=(second, 1)).get("/who").status_code == status
