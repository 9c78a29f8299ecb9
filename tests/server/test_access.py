"""Figures 28 and 29: nobody gets past the key, no page of another origin gets in, no request is read twice."""

from __future__ import annotations

import http.client
import socket

import pytest

from octavo.errors import UsageError
from octavo.server.access import Keys, read_keys
from octavo.server.app import ROUTES
from octavo.server.chat_page import PAGE_FILES
from octavo.server.settings import ServerSettings, check_server_settings


@pytest.fixture(scope="module")
def locked(serving, api_key):
    with serving(keys=Keys([api_key, "another-key-987654"])) as harness:
        harness.wait_ready()
        yield harness


def raw(port: int, request: bytes, seconds: float = 5) -> bytes:
    """What the server answers to these bytes, until it closes or says no more."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        connection.sendall(request)
        answer = b""
        connection.settimeout(1)
        try:
            while chunk := connection.recv(65536):
                answer += chunk
        except TimeoutError:
            pass
    return answer


ATTEMPTS = {
    "no key": {},
    "wrong key": {"authorization": "Bearer wrong-key-0123456789"},
    "prefix of the key": {"authorization": "Bearer test-key-012345678"},
    "key and more": {"authorization": "Bearer test-key-01234567890"},
    "other scheme": {"authorization": "Basic test-key-0123456789"},
    "no scheme": {"authorization": "test-key-0123456789"},
    "upper case key": {"authorization": "Bearer TEST-KEY-0123456789"},
    "empty": {"authorization": "Bearer"},
    "in another header": {"x-api-key": "test-key-0123456789"},
    "forwarded": {"x-forwarded-for": "127.0.0.1", "x-original-url": "/health"},
}


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_every_route_wants_a_key(locked, attempt):
    bodies = set()
    for spec in ROUTES:
        if spec.path in ("/health", "/ready", *PAGE_FILES):  # the page holds nothing of the server's
            continue
        path = spec.path.replace("{name:path}", "fake")
        response = locked.client.request(spec.method, path, headers=ATTEMPTS[attempt], content=b"{}")
        if path.startswith("/admin"):
            assert response.json()["error"]["code"] == "admin_disabled"
            continue
        assert response.status_code == 401, path
        assert response.headers["www-authenticate"] == "Bearer"
        bodies.add(response.content)
    assert len(bodies) == 1


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_probes_want_none(locked, path):
    assert locked.client.get(path).status_code == 200


@pytest.mark.parametrize("key", ["test-key-0123456789", "another-key-987654"])
@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_every_key_opens(locked, key, scheme):
    assert locked.client.get("/v1/models", headers={"authorization": f"{scheme} {key}"}).status_code == 200


TARGETS = [
    "//v1/models",
    "/v1//models",
    "/health/../v1/models",
    "/health%2f..%2fv1/models",
    "/v1/models?x=/health",
    "/v1/models#/health",
    "/v1/models;/health",
    "/v1/models/",
    "http://health/v1/models",
    "/%76%31/models",
    "/V1/models",
    "/docs",
    "/redoc",
    "/admin",
    "//",
    "/page/",
    "/page/../v1/models",
    "*",
]


@pytest.mark.parametrize("target", TARGETS)
def test_no_spelling_of_a_path_opens_it(locked, target):
    answer = raw(
        locked.port, f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
    )
    assert answer.startswith((b"HTTP/1.1 401", b"HTTP/1.1 400", b"HTTP/1.1 403")), answer[:200]


HOSTS = [
    "localhost/health?",
    "localhost:1/health#",
    "127.0.0.1@evil",
    "x\\health",
    "",
    "a b",
    "local host:80",
    "[::1",
]


@pytest.mark.parametrize("host", HOSTS)
def test_no_host_header_opens_a_path(locked, host):
    answer = raw(
        locked.port, f"GET /v1/models HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode("latin-1")
    )
    assert answer.startswith((b"HTTP/1.1 401", b"HTTP/1.1 400", b"HTTP/1.1 403")), answer[:200]


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.nip.io", "10.0.0.1"]
)
def test_a_name_that_is_not_ours_is_refused(fake, host):
    """DNS rebinding: the page's own name is in Host."""
    response = fake.client.get("/v1/models", headers={"host": host})
    assert response.status_code == 403
    assert response.json()["error"]["code"] == "host_not_allowed"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.8.8:99", "[::1]:5", "LOCALHOST"])
def test_names_of_this_machine_are_taken(fake, host):
    assert fake.client.get("/v1/models", headers={"host": host}).status_code == 200


def test_a_name_can_be_allowed(serving):
    with serving(allow_host=("model.lan",)) as harness:
        assert harness.client.get("/health", headers={"host": "model.lan:8000"}).status_code == 200
        assert harness.client.get("/health", headers={"host": "other.lan"}).status_code == 403


def test_no_origin_is_allowed_unless_configured(fake, serving):
    ask = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    for response in (
        fake.client.options("/v1/chat/completions", headers=ask),
        fake.client.get("/v1/models", headers=ask),
        fake.chat("x!stop"),
    ):
        assert not [name for name in response.headers if name.startswith("access-control")]
    with serving(cors_origin=("https://app.example",)) as harness:
        good = {**ask, "origin": "https://app.example"}
        response = harness.client.options("/v1/models", headers=good)
        assert response.headers["access-control-allow-origin"] == "https://app.example"
        assert "access-control-allow-origin" not in harness.client.get("/v1/models", headers=ask).headers


@pytest.mark.parametrize(
    "kind",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "", "application/jsonx"],
)
def test_what_a_form_can_send_is_refused(fake, kind):
    response = fake.client.post(
        "/v1/completions", content=b'{"model":"fake"}', headers={"content-type": kind}
    )
    assert response.status_code == 415
    assert response.json()["error"]["code"] == "unsupported_media_type"


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
SMUGGLED = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
SMUGGLING = {
    "length and chunks": HEAD
    + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    + SMUGGLED,
    "two lengths": HEAD + b"Content-Length: 2\r\nContent-Length: 40\r\n\r\n{}" + SMUGGLED,
    "list of lengths": HEAD + b"Content-Length: 2, 40\r\n\r\n{}" + SMUGGLED,
    "signed length": HEAD + b"Content-Length: +2\r\n\r\n{}",
    "negative length": HEAD + b"Content-Length: -1\r\n\r\n{}",
    "hex length": HEAD + b"Content-Length: 0x2\r\n\r\n{}",
    "bad chunk end": HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}XX0\r\n\r\n",
    "bad chunk size": HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    "negative chunk size": HEAD + b"Transfer-Encoding: chunked\r\n\r\n-2\r\n{}\r\n0\r\n\r\n",
    "huge chunk size": HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 40 + b"\r\n",
    "other coding": HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "coding twice": HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "space before colon": b"GET /v1/models HTTP/1.1\r\nHost : localhost\r\n\r\n",
    "folded header": b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX: a\r\n\tb: c\r\n: d\r\n\r\n",
    "no host": b"GET /v1/models HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n",
    "zero in header": b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX: a\x00b\r\n\r\n",
    "bare line feed in target": b"GET /v1/mo\ndels HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "no version": b"GET /v1/models\r\nHost: localhost\r\n\r\n",
    "other protocol": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 50 + b"\r\n\r\n",
}


@pytest.mark.parametrize("name", SMUGGLING)
def test_a_malformed_request_is_refused_and_the_connection_closed(fake, name):
    answer = raw(fake.port, SMUGGLING[name])
    status = int(answer.split(b" ", 2)[1]) if answer else 400
    assert 400 <= status < 500 or status == 501, answer[:200]
    assert answer.count(b"HTTP/1.1 ") <= 1, "a second request was read from the first one's body"
    assert b'"object":"list"' not in answer


def test_a_refused_body_is_not_read_as_the_next_request(fake):
    request = (
        HEAD.replace(b"application/json", b"text/plain")
        + b"Content-Length: %d\r\n\r\n" % len(SMUGGLED)
        + SMUGGLED
    )
    answer = raw(fake.port, request)
    assert answer.startswith(b"HTTP/1.1 415")
    assert answer.count(b"HTTP/1.1 ") == 1


def test_an_open_address_needs_a_key():
    with pytest.raises(UsageError, match="no API key"):
        check_server_settings(ServerSettings(host="0.0.0.0"), has_keys=False)
    check_server_settings(ServerSettings(host="0.0.0.0"), has_keys=True)
    for host in ("127.0.0.1", "::1", "localhost"):
        check_server_settings(ServerSettings(host=host), has_keys=False)


def test_key_files(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# ours\nfirst-key-123\n\nsecond-key-456 # for the phone\n")
    file.chmod(0o644)
    with pytest.raises(UsageError, match="others may read"):
        read_keys(file, None)
    file.chmod(0o600)
    keys = read_keys(file, "third-key-789")
    for key in ("first-key-123", "second-key-456", "third-key-789"):
        assert keys.find(f"Bearer {key}")
    assert keys.find("Bearer fourth-key") is None
    assert not read_keys(None, None)
    file.write_text("short\n")
    with pytest.raises(UsageError, match="shorter than"):
        read_keys(file, None)
    with pytest.raises(UsageError, match="cannot read"):
        read_keys(tmp_path / "missing", None)


def test_ids_of_keys_differ_and_do_not_hold_them():
    keys = Keys(["first-key-123", "second-key-456"])
    first, second = keys.find("Bearer first-key-123"), keys.find("Bearer second-key-456")
    assert first != second
    assert "first" not in str(first)


def test_a_request_id_is_echoed_only_where_it_is_harmless(fake):
    assert (
        fake.client.get("/health", headers={"x-request-id": "abc-1.2_3"}).headers["x-request-id"]
        == "abc-1.2_3"
    )
    for bad in ("a b", "x" * 200, "<script>", "é".encode("latin-1")):
        found = fake.client.get("/health", headers={"x-request-id": bad}).headers["x-request-id"]
        assert len(found) == 24
        int(found, 16)


def test_unknown_paths_and_methods_are_in_our_shape(fake):
    for method, path, status in (
        ("GET", "/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/health", 405),
    ):
        response = fake.client.request(method, path)
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        assert response.headers["x-request-id"]


def test_head_of_a_get_route(fake):
    connection = http.client.HTTPConnection("127.0.0.1", fake.port)
    connection.request("HEAD", "/health")
    response = connection.getresponse()
    assert (response.status, response.read()) == (200, b"")
    connection.close()


def test_admin_needs_its_own_key(serving, served, api_key):
    with serving(served(), keys=Keys([api_key]), admin_keys=Keys(["admin-key-123456"])) as harness:
        harness.wait_ready()

        def post(what: str, key: str, **body: str) -> int:
            headers = {"authorization": f"Bearer {key}"}
            return harness.client.post(f"/admin/models/{what}", json=body, headers=headers).status_code

        assert post("unload", api_key, model="fake") == 401
        assert post("unload", "admin-key-123456", model="other") == 404
        assert post("unload", "admin-key-123456", model="fake") == 200
        assert harness.service.models.state("fake") == "unloaded"
        assert post("load", "admin-key-123456", model="fake") == 200
        assert harness.service.models.state("fake") == "ready"
        assert (
            harness.client.get("/v1/models", headers={"authorization": "Bearer admin-key-123456"}).status_code
            == 401
        )
