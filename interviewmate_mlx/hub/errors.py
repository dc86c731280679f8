"""Explains failures of the Hub, the network and the disk, and says what to do about them."""

import errno
import json
import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import httpx2
from huggingface_hub import constants, get_token
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from huggingface_hub.utils import logging as library_logging
from huggingface_hub.utils.tqdm import disable_progress_bars

from interviewmate_mlx.errors import HubError, redact_secrets
from interviewmate_mlx.hub.network import (
    NetworkSettingsError,
    check_settings,
    hide_passwords,
    settings_in_words,
)

_LOG_IN = "run `hf auth login`, or set HF_TOKEN"

# What a call of huggingface_hub raises when the Hub, the network or the disk fails.
LIBRARY_ERRORS = (
    httpx2.HTTPError,
    httpx2.InvalidURL,
    EntryNotFoundError,
    HFValidationError,
    OSError,  # and NetworkSettingsError
    RuntimeError,  # from the threads of an upload
    UnicodeError,  # a token that cannot be sent
    json.JSONDecodeError,
)


@contextmanager
def as_hub_error(
    kind: str, repo_id: str, revision: str | None = None, *, writes: bool = False
) -> Iterator[None]:
    """Turn errors of the library into a HubError. Only calls of the library belong in the block.

    The library's error is not chained: it holds the request, and so the token.
    """
    try:
        with quiet_library():
            check_settings()
            yield
    except LIBRARY_ERRORS as error:
        raise HubError(explain(error, kind, repo_id, revision, writes=writes)) from None


@contextmanager
def quiet_library() -> Iterator[None]:
    """Hide the library's progress bars and warnings, unless the user asked for them."""
    with ExitStack() as stack:
        if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
            stack.enter_context(disable_progress_bars())
        if library_logging.get_verbosity() == logging.WARNING:  # the default
            library_logging.set_verbosity(logging.ERROR)
            stack.callback(library_logging.set_verbosity, logging.WARNING)
        yield


def is_unreachable(error: BaseException) -> bool:
    """Whether the network or the Hub failed; false if the request itself was wrong."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    faulty_request = (httpx2.LocalProtocolError, httpx2.UnsupportedProtocol)
    if isinstance(error, httpx2.TransportError):
        return not isinstance(error, faulty_request)
    return isinstance(error, OfflineModeIsEnabled | NetworkSettingsError)


def explain(
    error: BaseException,
    kind: str,
    repo_id: str,
    revision: str | None = None,
    *,
    writes: bool = False,
) -> str:
    """A message for an error: the first line says what happened, the last what to do.

    A message about the network says what the environment sets for it. It quotes nothing of
    the request, which holds the token.
    """
    while isinstance(error, RuntimeError) and error.__cause__:
        error = error.__cause__  # the error in an upload's thread
    text = _explain(error, kind, repo_id, revision, writes)
    return without_tokens(with_settings(text) if _is_about_network(error) else text)


def with_settings(text: str) -> str:
    """A message with what the environment sets for the network, after its first line."""
    happened, _, rest = text.partition("\n")
    return "\n".join(filter(None, [happened, settings_in_words(), rest]))


def _is_about_network(error: BaseException) -> bool:
    if isinstance(error, HfHubHTTPError):  # the Hub has answered, or a proxy in its place
        return error.response.status_code >= 500 or error.response.status_code == 407
    of_network = httpx2.HTTPError | httpx2.InvalidURL | json.JSONDecodeError
    return isinstance(error, of_network) and not isinstance(error, httpx2.LocalProtocolError)


def _explain(
    error: BaseException, kind: str, repo_id: str, revision: str | None, writes: bool
) -> str:
    hub = constants.ENDPOINT
    what = f"{'data set' if kind == 'dataset' else kind} {repo_id}"
    match error:
        case HfHubHTTPError():
            page = f"{hub}/{'datasets/' if kind == 'dataset' else ''}{repo_id}"
            return _explain_response(error, what, page, revision, writes)
        case HFValidationError():
            return (
                f"{repo_id!r} is not a folder here, and cannot be a name on the Hub: "
                "expected owner/name.\nCheck the spelling."
            )
        case NetworkSettingsError():
            return str(error)
        case OfflineModeIsEnabled():
            then = "push" if writes else "download the files that the cache lacks"
            return f"HF_HUB_OFFLINE is set: cannot reach the {what}.\nUnset it to {then}."
        case httpx2.LocalProtocolError() | UnicodeError():
            return (
                "The token for the Hub has characters that are not allowed.\n"
                f"To log in again, {_LOG_IN}."
            )
        case httpx2.UnsupportedProtocol() | httpx2.InvalidURL():
            return f"HF_ENDPOINT is not an address: {hub!r}.\nUnset it, or start it with https://"
        case httpx2.ProxyError():
            return (
                f"The proxy cannot reach {hub}.\n"
                "Check HTTPS_PROXY, HTTP_PROXY, ALL_PROXY and NO_PROXY."
            )
        case httpx2.TimeoutException():
            return (
                f"{hub} does not answer.\n"
                "Check the network and its settings, and run the command again."
            )
        case httpx2.ConnectError() if "certificate" in str(error).lower():
            return (
                f"The certificate of {hub} is not trusted.\n"
                "Behind a company's proxy, set SSL_CERT_FILE to its certificates."
            )
        case httpx2.ConnectError():
            return (
                f"Cannot reach {hub}.\n"
                "Check the network and its settings, and run the command again."
            )
        case httpx2.HTTPError():
            return f"The connection to {hub} was interrupted.\nRun the command again."
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return (
                f"The disk of {constants.HF_HUB_CACHE} is full. What has arrived is kept.\n"
                "Free some space, or set HF_HOME to a folder on a larger disk. "
                "Then run the command again."
            )
        case OSError(errno=int(), filename=str() as name):
            return f"{name}: {error.strerror}.\nCheck its permissions, or change HF_HOME."
        case json.JSONDecodeError():
            return (
                f"{hub} answers, but not like a Hub.\n"
                "Check HF_ENDPOINT, and whether this network needs a login first."
            )
    return f"The Hub's library failed on {what}: {error}"


def _explain_response(
    error: HfHubHTTPError, what: str, page: str, revision: str | None, writes: bool
) -> str:
    status, url = error.response.status_code, error.response.url
    logged_in = "authorization" in error.response.request.headers
    tokens = f"{constants.ENDPOINT}/settings/tokens"
    if isinstance(error, RevisionNotFoundError):
        return f"The {what} has no revision {revision!r}.\nChoose one of those at {page}/tree/main."
    if isinstance(error, GatedRepoError):
        then = "" if logged_in else f", then {_LOG_IN}"
        return f"The {what} is gated: its owners must give access.\nAsk for it at {page}{then}."
    if isinstance(error, DisabledRepoError):
        return f"The {what} is disabled on the Hub.\nChoose another."
    if isinstance(error, EntryNotFoundError):
        return f"A file of the {what} is not on the Hub.\nChoose another revision."
    if status == 429:
        return "The Hub got too many requests from here (429).\nWait a few minutes, or log in."
    if status >= 500:
        return (
            f"The Hub at {url.host} failed ({status}).\n"
            "Run the command again later. See also https://status.huggingface.co."
        )
    if str(url).startswith(constants.ENDPOINT):  # not the storage, which takes no tokens
        if status == 401 and logged_in:
            return (
                "The Hub refuses your token (401): it is mistyped, expired or revoked.\n"
                f"Create one at {tokens} and {_LOG_IN}."
            )
        if status == 403:
            action = "write to" if writes else "read"
            return (
                f"Your token has no permission to {action} the {what} (403).\n"
                f"Change its permissions at {tokens}, or use another: {_LOG_IN}."
            )
        if status in (401, 404):
            if logged_in:
                return (
                    f"There is no {what}, or your token has no access to it ({status}).\n"
                    "Check the spelling."
                )
            return (
                f"There is no public {what} ({status}).\n"
                f"Check the spelling; if it is private, {_LOG_IN}."
            )
    reason = error.server_message or "no reason given"
    return f"{url.host} rejects the request for the {what} ({status}): {reason}\nSee {page}."


def without_tokens(text: str) -> str:
    """`text`, with this machine's token and anything like a secret replaced by `***`."""
    token = None
    with suppress(OSError):  # its file cannot be read
        token = get_token()
    return redact_secrets(hide_passwords(text.replace(token, "***") if token else text))
