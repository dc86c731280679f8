"""What a stranger may send: nothing is let in, nothing is lost, nobody sees a traceback."""

import json
import resource
import socket
import struct
import time
from contextlib import suppress

import httpx2
import psutil
import pytest

ASKED = {"messages": [{"role": "user", "content": "What is a loss?"}], "max_tokens": 4}
CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(autouse=True)
def still_well(served):
    """After each test the server answers, and its log shows no failure of its own."""
    before = len(served.log.read_text())
    yield
    assert served.process.poll() is None
    assert served.get("/health").json() == {"status": "ok"}
    assert served.post(CHAT, ASKED).status_code == 200
    assert "Traceback" not in served.log.read_text()[before:]


def raw(served, data: bytes, timeout: float = 30.0) -> bytes:
    """Send bytes as they are; return all that comes until the server closes."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=timeout) as sock:
        found = b""
        with suppress(OSError):  # it may close before all was sent
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError):
            while part := sock.recv(65536):
                found += part
        return found


def refused(response, status: int, code: str) -> None:
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


BODIES = [
    (b"", 400), (b"{", 400), (b"null", 400), (b"[]", 400), (b'"x"', 400), (b"\xff\xfe", 400),
    (b'{"messages": ' + b"[" * 100_000, 400),
    (b'{"messages": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", 400),
    (b'{"messages": [{"role": "user", "content": 5}]}', 400),
    (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400),
    (b'{"messages": "x"}', 400),
    (b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', 400),
    (b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}', 400),
    (b'{"messages": [{"role": "user", "content": "x"}], "n": 1000000000}', 400),
    (b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": -5}', 400),
    (b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1' + b"0" * 5000 + b"}", 400),
    (b'{"messages": [{"role": "user", "content": "x"}], "seed": 1' + b"0" * 30 + b"}", 400),
    (b'{"messages": [{"role": "user", "content": "x"}], "__class__": {"a": 1}}', 400),
    (b'{"messages": [{"role": "user", "content": "x"}], "model": "../../etc/passwd"}', 404),
    (b'{"messages": [{"role": "user", "content": "' + b"why " * 5000 + b'"}]}', 400),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status"), BODIES, ids=[str(i) for i in range(len(BODIES))])
def test_broken_body_is_refused_in_openai_s_form(served, body, status):
    response = httpx2.post(served.url + CHAT, content=body, headers=JSON, timeout=60)
    assert response.status_code == status
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert "Traceback" not in error["message"]
    assert len(error["message"]) < 2000


@pytest.mark.parametrize("with_length", [True, False])
def test_prompt_of_10_mb_is_too_large(served, with_length):
    body = json.dumps({"messages": [{"role": "user", "content": "x" * 10_000_000}]}).encode()
    if with_length:
        refused(httpx2.post(served.url + CHAT, content=body, headers=JSON), 413, "body_too_large")
        return
    head = f"POST {CHAT} HTTP/1.1\r\nHost: {served.host}\r\nContent-Type: application/json\r\n"
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    found = b""
    with socket.create_connection(("127.0.0.1", served.port), timeout=30) as sock:
        try:
            sock.sendall(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + chunked)
            found = sock.recv(65536)
        except (BrokenPipeError, ConnectionResetError):
            return  # closed before all was sent
    assert b" 413 " in found.split(b"\r\n")[0]


@pytest.mark.parametrize("length", ["-1", "1e3", "9" * 40, "x"])
def test_length_that_lies_is_refused(served, length):
    head = f"POST {CHAT} HTTP/1.1\r\nHost: {served.host}\r\nContent-Type: application/json\r\n"
    found = raw(served, f"{head}Content-Length: {length}\r\n\r\n{{}}".encode())
    assert found.split(b"\r\n")[0].split()[1] in (b"400", b"413")


@pytest.mark.parametrize(
    "data",
    [
        b"\r\n\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: " + b"y" * 200_000 + b"\r\n\r\n",
        b"GET /\x00\x1b[31m HTTP/1.1\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_what_is_no_http_is_refused(served, data):
    found = raw(served, data)
    assert found == b"" or found.split(b"\r\n")[0].split()[1] in (b"400", b"403", b"404", b"431")


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:{port}"},  # DNS rebinding: another name that points here
        {"Host": "127.0.0.1"},
        {"Host": "127.0.0.1:1"},
        {"Origin": "http://evil.example"},
        {"Origin": "http://127.0.0.1:1"},
        {"Origin": "null"},
        {"Origin": "file://"},
        {"Origin": "http://127.0.0.1:{port}.evil.example"},
    ],
)
@pytest.mark.parametrize("path", ["/", "/v1/models", "/metrics", CHAT, "/feedback"])
def test_other_web_pages_are_not_let_in(served, headers, path):
    filled = {name: value.format(port=served.port) for name, value in headers.items()}
    ask = served.post if path in (CHAT, "/feedback") else served.get
    response = ask(path, ASKED, **filled) if ask == served.post else ask(path, **filled)
    assert response.status_code == 403
    assert "access-control-allow-origin" not in response.headers


def test_its_own_page_is_let_in(served):
    assert served.post(CHAT, ASKED, Origin=served.url).status_code == 200
    named = {"Host": f"localhost:{served.port}", "Origin": f"http://localhost:{served.port}"}
    assert served.post(CHAT, ASKED, **named).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_what_a_form_can_send_is_refused(served, kind):
    """A web page may send these without asking first."""
    headers = {"Content-Type": kind} if kind else {}
    content = json.dumps(ASKED).encode()
    response = httpx2.post(served.url + CHAT, content=content, headers=headers)
    refused(response, 415, "unsupported_media_type")


@pytest.mark.parametrize(
    "path",
    ["/../pyproject.toml", "/page/../api.py", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd",
     "/page.js/..", "/page.html", "/api.py", "/page.js%00.html", "/docs", "/redoc", "/.env",
     "/page.css/../../server.py", "/..%5c..%5cwindows"],
)  # fmt: skip
def test_only_the_page_s_own_files_are_given(served, path):
    found = raw(served, f"GET {path} HTTP/1.1\r\nHost: {served.host}\r\n\r\n".encode())
    assert found.split(b"\r\n")[0].split()[1] == b"404"


@pytest.mark.parametrize(("path", "method"), [("/", "POST"), (CHAT, "GET"), ("/metrics", "DELETE")])
def test_other_methods_are_refused(served, path, method):
    content = b"{}" if method == "POST" else None
    response = httpx2.request(method, served.url + path, content=content, headers=JSON)
    refused(response, 405, "method_not_allowed")


def test_headers_keep_a_page_from_loading_or_framing_anything(served):
    headers = served.get("/").headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert "server" not in headers
    page = served.get("/").text
    assert "http://" not in page
    assert "https://" not in page


def test_control_characters_and_tags_come_back_as_text(served):
    text = "<script>alert(1)</script>\x1b[2J\u202e\x00</div>"
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 4}
    response = served.post(CHAT, body)
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert "\x1b" not in served.log.read_text()


def test_slow_body_is_not_waited_for_for_ever(served, monkeypatch):
    """A byte now and then: others are answered meanwhile, and in the end it is closed."""
    head = f"POST {CHAT} HTTP/1.1\r\nHost: {served.host}\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", served.port), timeout=40) as sock:
        sock.sendall(head.encode() + b"Content-Length: 1000\r\n\r\n")
        started = time.monotonic()
        sock.settimeout(1.0)
        found = b""
        while time.monotonic() - started < 40 and not found:
            try:
                sock.sendall(b" ")
                found = sock.recv(65536)
            except TimeoutError:
                assert served.get("/health").is_success
    assert b" 408 " in found.split(b"\r\n")[0]


def test_connection_that_says_nothing_is_closed(served):
    with socket.create_connection(("127.0.0.1", served.port), timeout=30) as sock:
        sock.sendall(b"GET / HT")
        assert sock.recv(65536) == b""


def test_half_closed_and_reset_connections_free_their_places(served):
    body = json.dumps({**ASKED, "max_tokens": 1500, "n": 4, "stream": True, "stop": "never"})
    request = (
        f"POST {CHAT} HTTP/1.1\r\nHost: {served.host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n{body}"
    ).encode()
    for is_reset in (True, False) * 5:
        sock = socket.create_connection(("127.0.0.1", served.port), timeout=30)
        sock.sendall(request)
        sock.recv(100)
        if is_reset:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            sock.shutdown(socket.SHUT_WR)
        sock.close()
    deadline = time.monotonic() + 30
    while served.metric("imate_running"):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_thousand_connections_are_survived(served):
    wanted, (soft, hard) = 1000, resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted + 100:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, wanted + 200), hard))
    count = min(wanted, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 100)
    before = psutil.Process(served.process.pid).memory_info().rss
    socks = []
    try:
        for _ in range(count):
            socks.append(socket.create_connection(("127.0.0.1", served.port), timeout=30))
        assert served.process.poll() is None
        grown = psutil.Process(served.process.pid).memory_info().rss - before
        assert grown < 200 << 20
    finally:
        for sock in socks:
            sock.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    deadline = time.monotonic() + 30
    while True:
        try:
            assert served.get("/health").is_success
            return
        except (httpx2.TransportError, AssertionError):
            assert time.monotonic() < deadline
            time.sleep(0.2)


def test_key_is_asked_for_by_every_route_but_the_page(serve, tiny_base):
    key = "s3cret-key"
    with serve("--model", tiny_base, INTERVIEWMATE_API_KEY=key) as served:
        for path in ("/", "/page.js", "/page.css", "/health"):
            assert served.get(path).is_success
        for path in ("/v1/models", "/metrics", "/openapi.json", "/interview/questions", "/nope"):
            refused(served.get(path), 401, "invalid_api_key")
            assert served.get(path, Authorization=f"Bearer {key}x").status_code == 401
            assert served.get(path, Authorization=f"Basic {key}").status_code == 401
            assert served.get(path, Authorization=f"Bearer {key}").status_code in (200, 404)
        assert served.post(CHAT, ASKED).headers["www-authenticate"] == "Bearer"
        assert served.post(CHAT, ASKED, Authorization=f"Bearer {key}").is_success
        assert key not in served.log.read_text()


def test_a_page_elsewhere_may_ask_where_it_is_named(serve, tiny_base):
    origin = "http://localhost:3000"
    with serve("--model", tiny_base, "--cors", origin) as served:
        allowed = served.post(CHAT, ASKED, Origin=origin)
        assert allowed.headers["access-control-allow-origin"] == origin
        asking = {"Access-Control-Request-Method": "POST"}
        headers = {"Origin": origin, **asking}
        response = httpx2.options(served.url + CHAT, headers=headers)
        assert response.status_code == 204
        assert "authorization" in response.headers["access-control-allow-headers"]
        assert served.post(CHAT, ASKED, Origin="http://localhost:3001").status_code == 403
