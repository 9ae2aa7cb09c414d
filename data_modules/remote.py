"""Files of a folder behind an address: s3://, gs:// or http(s)://, with patience for a server that does not answer.

boto3 and requests do the transfer. Training reads in forked workers, and obstore, which covers all of these addresses,
hangs in a process that was forked after its first use.
"""

import fcntl
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

import boto3
import botocore.exceptions
import botocore.parsers
import google.auth
import google.auth.exceptions
import requests
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError
from google.auth.transport.requests import AuthorizedSession

from zimage_lit.errors import UserError

PATIENCE = 900.0  # seconds that a server which does not answer is waited for, unless a setting says otherwise
BLOCK = 2**20  # bytes handed on at a time
# Seconds. A silent server is given up after the first timeout and asked again, each time after twice the wait and with
# twice the timeout: a stall is noticed soon, and a server that is merely slow gets its time.
FIRST_TIMEOUT, LONGEST_TIMEOUT = 5.0, 60.0
FIRST_WAIT, LONGEST_WAIT = 0.5, 5.0

T = TypeVar("T")

CREDENTIALS = {
    "s3": "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, to ones that may",
    "gs": "run `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS, as one who may",
    "http": "use an address that needs no login",
    "https": "use an address that needs no login",
}


class Unanswered(Exception):
    """The server gave no answer, or broke off in the middle of one; as a phrase. Another try may succeed."""


def is_remote(location: str | Path) -> bool:
    """Whether the location is an address and not a path."""
    return "://" in str(location)


class RemoteFolder:
    """A folder behind an address, read file by file. Works in forked processes and in several threads.

    s3:// takes credentials, region and AWS_ENDPOINT_URL as all AWS tools do, gs:// Google's application default
    credentials and STORAGE_EMULATOR_HOST; without credentials both read what is public.

    Raises:
        UserError: an address of another kind.
    """

    def __init__(self, location: str) -> None:
        self.location = location.rstrip("/")
        self.scheme = urlsplit(location).scheme
        if self.scheme not in _OPENERS or not urlsplit(location).netloc:
            raise UserError(
                f"{location} is not an address that data can be read from: give a folder, or an address that begins "
                "with s3://, gs://, http:// or https://."
            )
        self._own = threading.local()

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteFolder, (self.location,)

    def address(self, name: str) -> str:
        return f"{self.location}/{name}"

    def blocks(self, name: str, timeout: float) -> Iterator[bytes]:
        """The bytes of a file, in order. timeout: seconds that the server may be silent.

        Raises Unanswered, and UserError where asking again cannot help.
        """
        address = self.address(name)
        with _translated(address):
            with _connecting():
                body = self._opener(timeout)(address)
            yield from body

    def read(self, name: str, seconds: float) -> bytes:
        """A small file as a whole; waits for `seconds` for the server (see `patiently`)."""
        return patiently(lambda timeout: b"".join(self.blocks(name, timeout)), self.address(name), seconds)

    def _opener(self, timeout: float) -> Callable[[str], Iterator[bytes]]:
        """Connections are not shared between threads, nor with a forked process."""
        key = (os.getpid(), timeout)
        if getattr(self._own, "key", None) != key:
            self._own.key, self._own.opener = key, _OPENERS[self.scheme](timeout)
        return self._own.opener


def patiently(attempt: Callable[[float], T], address: str, seconds: float, announcements: Path | None = None) -> T:
    """attempt(timeout), again and again with growing waits as long as it raises Unanswered.

    Standard error says once that `address` is waited for and once that it goes on. Of all processes with the same
    `announcements`, a file for a lock, only one says so.

    Raises:
        UserError: no answer for `seconds` after the first failure; what `attempt` raises.
    """
    timeout = FIRST_TIMEOUT
    try:
        return attempt(timeout)
    except Unanswered as error:
        reason = error
    began, wait = time.monotonic(), FIRST_WAIT
    with _speaker(announcements) as say:
        say(f"{address} cannot be read now ({reason}): waiting for up to {_spoken(seconds)}")
        while (waited := time.monotonic() - began) < seconds:
            time.sleep(min(wait, seconds - waited))
            wait, timeout = min(2 * wait, LONGEST_WAIT), min(2 * timeout, LONGEST_TIMEOUT)
            try:
                result = attempt(timeout)
            except Unanswered as error:
                reason = error
                continue
            say(f"{address} is read again after {_spoken(time.monotonic() - began)}: going on")
            return result
    raise UserError(
        f"{address} could not be read for {_spoken(seconds)} ({reason}): see that the server answers, then start the "
        "same command again; data.init_args.cache.patience is how long it is waited for."
    ) from reason


@contextmanager
def _speaker(announcements: Path | None) -> Iterator[Callable[[str], None]]:
    """Says a message on standard error, unless another process is already speaking."""
    lock = FileLock(announcements) if announcements else None
    try:
        heard = lock is None or lock.take(fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield lambda message: print(f"data: {message}", file=sys.stderr, flush=True) if heard else None
    finally:
        if lock:
            lock.let_go()


class FileLock:
    """A lock that processes and threads share through a file; it ends with the process that holds it.

    Not fcntl.lockf: its locks are lost when any other part of the process closes the same file. Nor the package
    filelock: it has no shared locks.
    """

    _descriptor = -1

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def take(self, how: int) -> bool:
        """how: fcntl.LOCK_SH or LOCK_EX; with LOCK_NB, False where another one has it. Lets go of what it held."""
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            fcntl.flock(self._descriptor, how)
        except BlockingIOError:
            return False
        return True

    def let_go(self) -> None:
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # closing is not enough: a forked process may have a copy
        self._close()

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    __del__ = _close  # forgotten here, or a forked process's copy, which must not open the parent's lock


# How the three kinds of address are opened


class _S3:
    """boto3 with the environment's own settings; without any credentials, unsigned."""

    def __init__(self, timeout: float) -> None:
        session = boto3.Session()
        options: dict[str, Any] = {} if session.get_credentials() else {"signature_version": UNSIGNED}
        self._client = session.client(
            "s3",
            config=Config(connect_timeout=timeout, read_timeout=timeout, retries={"total_max_attempts": 1}, **options),
        )

    def __call__(self, address: str) -> Iterator[bytes]:
        bucket, _, key = address.removeprefix("s3://").partition("/")
        try:
            answer = self._client.get_object(Bucket=bucket, Key=key)
        except ClientError as error:
            status = error.response["ResponseMetadata"]["HTTPStatusCode"]
            code, message = error.response["Error"].get("Code", ""), error.response["Error"].get("Message", "")
            raise _refusal(address, status, code, message) from error
        return iter(answer["Body"].iter_chunks(BLOCK))


class _Http:
    """A plain web server."""

    def __init__(self, timeout: float) -> None:
        self._session = requests.Session()
        self._timeout = timeout

    def __call__(self, address: str) -> Iterator[bytes]:
        return self._get(address, address)

    def _get(self, address: str, url: str) -> Iterator[bytes]:
        # identity: the bytes as they are stored, not packed on the way
        answer = self._session.get(url, stream=True, timeout=self._timeout, headers={"Accept-Encoding": "identity"})
        if answer.status_code != 200:
            answer.close()
            raise _refusal(address, answer.status_code, "", answer.reason or "")
        return iter(answer.iter_content(BLOCK))


class _GoogleStorage(_Http):
    """Google's storage over its own web address; without any credentials, unsigned."""

    def __init__(self, timeout: float) -> None:
        super().__init__(timeout)
        self._server = os.environ.get("STORAGE_EMULATOR_HOST", "").rstrip("/")
        if self._server:
            return
        self._server = "https://storage.googleapis.com"
        try:
            credentials, _ = google.auth.default(["https://www.googleapis.com/auth/devstorage.read_only"])
            self._session = AuthorizedSession(credentials)
        except google.auth.exceptions.DefaultCredentialsError:
            pass

    def __call__(self, address: str) -> Iterator[bytes]:
        return self._get(address, f"{self._server}/{quote(address.removeprefix('gs://'))}")


_OPENERS: dict[str, Callable[[float], Callable[[str], Iterator[bytes]]]] = {
    "s3": _S3,
    "gs": _GoogleStorage,
    "http": _Http,
    "https": _Http,
}


def _refusal(address: str, status: int, code: str, message: str) -> Exception:
    """What an answer that is no file means."""
    reason = ": ".join(part for part in (code or str(status), message.rstrip(".")) if part)
    if status >= 500 or status in (408, 425, 429) or code in ("RequestTimeout", "SlowDown"):
        return Unanswered(reason)
    if status == 404:
        return UserError(
            f"There is no {address} ({reason}): correct data.init_args.data_dir, or copy the whole data set there."
        )
    if status in (401, 403) or code in ("ExpiredToken", "InvalidToken"):
        return _forbidden(address, reason)
    return UserError(f"{address} cannot be read ({reason}): correct data.init_args.data_dir.")


def _forbidden(address: str, reason: str) -> UserError:
    way_out = CREDENTIALS[urlsplit(address).scheme]
    return UserError(f"{address} may not be read with these credentials ({reason}): {way_out}.")


@contextmanager
def _translated(address: str) -> Iterator[None]:
    """The exceptions of the libraries, as Unanswered or UserError."""
    try:
        yield
    except _PASSING as error:
        raise Unanswered(_reason(error)) from error
    except _CREDENTIALS_FAILED as error:
        raise _forbidden(address, _reason(error)) from error
    except (BotoCoreError, requests.RequestException) as error:
        raise UserError(f"{address} cannot be read ({_reason(error)}): correct data.init_args.data_dir.") from error


_PASSING = (
    botocore.exceptions.ConnectionError,
    botocore.exceptions.HTTPClientError,
    botocore.exceptions.IncompleteReadError,
    botocore.exceptions.FlexibleChecksumError,
    botocore.parsers.ResponseParserError,
    google.auth.exceptions.TransportError,
    requests.ConnectionError,
    requests.Timeout,
    requests.exceptions.ChunkedEncodingError,
)
_CREDENTIALS_FAILED = (
    botocore.exceptions.CredentialRetrievalError,
    botocore.exceptions.NoCredentialsError,
    botocore.exceptions.PartialCredentialsError,
    botocore.exceptions.ProfileNotFound,
    botocore.exceptions.SSOError,
    botocore.exceptions.TokenRetrievalError,
    google.auth.exceptions.GoogleAuthError,
)


def _reason(error: BaseException) -> str:
    """The innermost cause in a few words: the libraries wrap it in sentences of their own."""
    while isinstance(inner := getattr(error, "reason", None) or (error.args or [None])[-1], BaseException):
        error = inner
    text = re.sub(r"^HTTPS?Connection(Pool)?\(.*?\): ", "", " ".join(str(error).split())).rstrip(".")
    return f"{text[:120]} …" if len(text) > 120 else text or type(error).__name__


# A process that is forked while another thread opens a connection may inherit a lock of the TLS library that nobody
# will open again. So a fork waits until no connection is being opened, and none is opened during a fork.
_changed = threading.Condition()
_being_opened = 0


@contextmanager
def _connecting() -> Iterator[None]:
    global _being_opened
    with _changed:
        _being_opened += 1
    try:
        yield
    finally:
        with _changed:
            _being_opened -= 1
            _changed.notify_all()


def _before_fork() -> None:
    _changed.acquire()
    _changed.wait_for(lambda: _being_opened == 0, timeout=LONGEST_TIMEOUT)


def _after_fork_in_parent() -> None:
    _changed.release()


def _after_fork_in_child() -> None:
    global _changed, _being_opened
    _changed, _being_opened = threading.Condition(), 0


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)


def _spoken(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 120 else f"{seconds:.0f} s"
