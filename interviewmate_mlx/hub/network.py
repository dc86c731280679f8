"""What the environment says of proxies and certificates, checked and put into words.

The Hub's library builds its client from these settings. If one of them is wrong, it fails
with an error that names no variable, or that is not about the network at all.
"""

import importlib.util
import os
import ssl
from collections.abc import Iterator
from urllib.request import getproxies

import httpx2
from huggingface_hub import get_session

_PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")
_VARIABLES = (
    *_PROXIES,
    "NO_PROXY",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "REQUESTS_CA_BUNDLE",
    "HF_ENDPOINT",
)


class NetworkSettingsError(OSError):
    """A setting of the network cannot be used. Its text is a message for the user."""


def check_settings() -> None:
    """Build the library's client. It is built once a process.

    Raises:
        NetworkSettingsError: the environment keeps it from being built. The variable is named.
    """
    try:
        get_session()
    except (ImportError, ValueError, OSError, httpx2.InvalidURL) as error:
        faults = list(_faults()) or [f"got {type(error).__name__} from the Hub's library"]
        listed = "\n".join(f"  {fault}" for fault in faults)
        raise NetworkSettingsError(
            f"The settings of the network cannot be used:\n{listed}\n"
            "Correct them, or unset these variables."
        ) from None


def settings_in_words() -> str:
    """The settings on one line, without passwords; empty if there are none."""
    settings = dict(_environment())
    if not any(name.upper() in _PROXIES for name in settings):  # on macOS the system's count then
        system = {k: v for k, v in getproxies().items() if k in ("https", "http", "all")}
        settings |= {f"the system's {scheme} proxy": url for scheme, url in system.items()}
    shown = [
        f"{name}={_without_login(value)}{_remark(name, value)}" for name, value in settings.items()
    ]
    return f"Set here: {', '.join(shown)}" if shown else ""


def hide_passwords(text: str) -> str:
    """Replace names and passwords of these settings, wherever they are in a text, by `***`."""
    for _, value in _environment():
        login = value.rpartition("://")[2].rpartition("@")[0]
        if login:
            text = text.replace(f"{login}@", "***@")
    return text


def _environment() -> Iterator[tuple[str, str]]:
    """The variables that are set. Proxies are read in lower case, too."""
    for known in _VARIABLES:
        for name in dict.fromkeys((known.lower() if "PROXY" in known else known, known)):
            if value := os.environ.get(name):
                yield name, value


def _without_login(value: str) -> str:
    scheme, separator, rest = value.rpartition("://")
    login, at, place = rest.rpartition("@")
    return f"{scheme}{separator}{'***' if login else ''}{at}{place}"


def _remark(name: str, value: str) -> str:
    if name == "SSL_CERT_FILE" and not os.path.isfile(value):
        return " (no such file)"
    if name == "SSL_CERT_DIR" and not os.path.isdir(value):
        return " (no such folder)"
    return " (not read here)" if name == "REQUESTS_CA_BUNDLE" else ""


def _faults() -> Iterator[str]:
    """What is wrong with each variable, as far as that can be seen from here."""
    has_socks = importlib.util.find_spec("socksio") is not None
    for name, value in _environment():
        if name.upper() in _PROXIES:
            shown = f"{name}: got {_without_login(value)}"
            try:
                scheme = httpx2.Proxy(value if "://" in value else f"http://{value}").url.scheme
            except (ValueError, httpx2.InvalidURL):
                yield f"{shown}, expected an address that starts with http://, https:// or socks5://"
                continue
            if scheme.startswith("socks") and not has_socks:
                yield (
                    f"{shown}, a SOCKS proxy, for which a package is missing "
                    "(pip install socksio); or give an http:// proxy"
                )
        elif name == "SSL_CERT_FILE":
            try:
                ssl.create_default_context(cafile=value)
            except OSError as error:  # also ssl.SSLError
                reason = error.strerror if isinstance(error, FileNotFoundError) else error
                yield f"{name}: got {value}, expected a file with certificates (PEM): {reason}"
