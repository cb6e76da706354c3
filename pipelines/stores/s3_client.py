"""
One bucket of an S3 service: how it is reached, what its answers mean, and what to do about them.

botocore does the talking, which s3fs and aiobotocore of dvc[s3] are built on, too. s3fs itself is
not used: its upload holds ten parts of 50 MiB, throws away on an error what could be gone on with,
and tells a refused condition, a wrong login and a missing bucket apart only as errors of files.

Login, profile, region and CA come from where every AWS tool looks (environment, ~/.aws, the
machine's role), never from params.yaml. Attempts and pauses: `pipelines.stores.transfer`.
"""

from __future__ import annotations

import email.utils
import functools
import os
import threading
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from urllib.parse import urlsplit

from pipelines import __version__, console
from pipelines.errors import ParamsError, StoreError
from pipelines.stores import transfer
from pipelines.stores.addresses import is_loopback
from pipelines.stores.base import NotThereError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from pipelines.params import Registry

# What botocore takes and gives: it has no types.
Answer: TypeAlias = Any

CREDENTIALS: Final = (
    "AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or AWS_PROFILE,"
)
_CONNECT_TIMEOUT_S: Final = 10
_READ_TIMEOUT_S: Final = 60
# Some services put the parts of a large file together while we wait.
_PATIENT_READ_TIMEOUT_S: Final = 900
_CONNECTIONS: Final = 10

# What each answer of S3 has; a page of somebody in between does not.
_ALWAYS_THERE: Final = {
    "put_object": ("ETag",),
    "upload_part": ("ETag",),
    "head_object": ("ETag", "ContentLength", "LastModified"),
    "get_object": ("ETag",),
    "complete_multipart_upload": ("ETag",),
    "create_multipart_upload": ("UploadId",),
    "list_objects_v2": ("IsTruncated",),
    "list_multipart_uploads": ("IsTruncated",),
    "list_parts": ("IsTruncated",),
}
# And what each entry of a list has.
_OF_EACH: Final = {
    "Contents": ("Key", "Size", "LastModified", "ETag"),
    "CommonPrefixes": ("Prefix",),
    "Uploads": ("Key", "UploadId", "Initiated"),
    "Parts": ("PartNumber", "ETag", "Size"),
}
# A list that goes on after ten million entries is none.
_MAX_PAGES: Final = 10_000

# A part that somebody sent anew meanwhile, of another size perhaps, is gone as the old one was.
_ABSENT: Final = frozenset({"InvalidPart", "NoSuchKey", "NoSuchUpload"})
# Of S3's errors with 4xx, those that pass: garbled or slow on the way, or somebody else is at it.
_PASSING: Final = frozenset({
    "BadDigest", "ConditionalRequestConflict", "IncompleteBody", "OperationAborted",
    "RequestLimitExceeded", "RequestThrottled", "RequestTimeout", "SlowDown", "Throttling",
    "ThrottlingException", "TooManyRequests", "XAmzContentSHA256Mismatch",
})  # fmt: skip
_EXPIRED: Final = frozenset(
    {
        "ExpiredToken",
        "ExpiredTokenException",
        "InvalidToken",
        "RequestExpired",
        "TokenRefreshRequired",
    }
)
_WRONG_LOGIN: Final = frozenset({
    "InvalidAccessKeyId", "InvalidSecurity", "SignatureDoesNotMatch", "XAdminUserNotFound",
})  # fmt: skip
_DENIED: Final = frozenset({"AccessDenied", "AllAccessDisabled", "AccountProblem", "Forbidden"})
_FULL: Final = frozenset(
    {
        "InsufficientCapacity",
        "InsufficientStorage",
        "QuotaExceeded",
        "StorageFull",
        "XMinioStorageFull",
    }
)
_OTHER_REGION: Final = frozenset(
    {"AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect"}
)
_NO_LOGIN: Final = frozenset({
    "CredentialRetrievalError", "NoCredentialsError", "PartialCredentialsError", "SSOError",
    "SSOTokenLoadError", "TokenRetrievalError", "UnauthorizedSSOTokenError",
})  # fmt: skip
_PERMISSIONS: Final = (
    "s3:ListBucket, s3:ListBucketMultipartUploads, s3:GetObject, s3:PutObject, s3:DeleteObject, "
    "s3:AbortMultipartUpload and s3:ListMultipartUploadParts"
)


class AbsentError(NotThereError):
    """There is no such object, or no such upload."""


class ConditionError(StoreError):
    """The condition of a request does not hold: 412. Nothing was written by this attempt."""


class UnknownRequestError(StoreError):
    """The service does not know this request: 501."""


class RangeError(StoreError):
    """There is no byte at that offset: 416."""


class Bucket:
    """A bucket; threads may share it."""

    def __init__(self, key: str, registry: Registry, bucket: str, *, deadline_s: float) -> None:
        """
        Remember where it is; nothing is asked of it yet.

        Args:
            key: Name of the registry in params.yaml.
            registry: Its declaration.
            bucket: Name of the bucket.
            deadline_s: How long a request that fails is made again.

        Raises:
            ParamsError: Plain HTTP to another machine, and `insecure` is not declared.
        """
        self._key = key
        self._registry = registry
        self.deadline_s = deadline_s
        self._lock = threading.Lock()
        self._clients: dict[bool, Any] = {}
        self._seen = False
        self.bucket = bucket
        self.shown = registry.url + (f" at {registry.endpoint}" if registry.endpoint else "")
        self._refuse_plain_http(registry.endpoint or "")

    def ask(self, operation: str, what: str, *, patient: bool = False, **request: Answer) -> Answer:
        """
        Make one request, again while its failure may pass.

        Args:
            operation: Method of botocore's client.
            what: What it is for, e.g. `writing blob 0123456789ab`.
            patient: It may take minutes.
            **request: Its arguments, without the bucket.

        Raises:
            AbsentError: There is no such object or upload; a missing bucket is a StoreError.
            ConditionError: `IfMatch` or `IfNoneMatch` does not hold. If an earlier attempt lost its
                answer, that one may have been what changed it.
            UnknownRequestError: The service does not know such requests.
            StoreError: It refused, or what answered is no S3.
            RetryLaterError: It failed until the deadline.
        """

        def attempt() -> Answer:
            try:
                client = self._client(patient=patient)
                answer = getattr(client, operation)(Bucket=self.bucket, **request)
            except Exception as error:
                refusal = self._refusal(operation, error, what)
                if refusal is None:
                    raise
                raise refusal from error
            self._require_s3(operation, answer, what)
            return answer

        answer = transfer.retrying(
            f"{self.shown}: {what}",
            attempt,
            deadline_s=self.deadline_s,
            credentials=CREDENTIALS,
            failure=_failure,
        )
        self._seen = True
        return answer

    def pages(
        self, operation: str, what: str, marks: Mapping[str, str], **request: Answer
    ) -> Iterator[Answer]:
        """
        Make a request for a list again and again, until it is complete.

        Args:
            operation: Method of botocore's client.
            what: What it is for.
            marks: Which field of an answer becomes which argument of the next request.
            **request: Arguments.
        """
        for _ in range(_MAX_PAGES):
            answer = self.ask(operation, what, **request)
            yield answer
            if not answer["IsTruncated"]:
                return
            following = {name: answer.get(field) for field, name in marks.items()}
            if not any(following.values()) or all(
                request.get(name) == value for name, value in following.items()
            ):
                break
            request |= {name: value for name, value in following.items() if value}
        raise StoreError(
            f"{self.shown}: {what}: the list never ends: the service says that there is more, and "
            "not where.",
            hint="This service does not keep to S3's way of listing; use another one.",
        )

    def _client(self, *, patient: bool) -> Answer:
        """Return the client; made at the first use, since that looks for the login."""
        with self._lock:
            if patient not in self._clients:
                timeout_s = _PATIENT_READ_TIMEOUT_S if patient else _READ_TIMEOUT_S
                client = _connect(self._registry, timeout_s)
                # The environment and ~/.aws may name an endpoint, too.
                self._refuse_plain_http(client.meta.endpoint_url)
                self._clients[patient] = client
            return self._clients[patient]

    def _refuse_plain_http(self, address: str) -> None:
        parts = urlsplit(address)
        if (
            parts.scheme == "http"
            and not self._registry.insecure
            and not is_loopback(parts.hostname)
        ):
            raise ParamsError(
                f"registries.{self._key}: {console.clean(address)} is plain HTTP to another "
                "machine: everybody in between could change the models.",
                hint=f"Use https://, or declare registries.{self._key}.insecure: true if the "
                "network between is trusted.",
            )

    def _require_s3(self, operation: str, answer: Answer, what: str) -> None:
        """See that an answer is of S3: a page of something in between has none of its fields."""
        missing = [field for field in _ALWAYS_THERE.get(operation, ()) if field not in answer]
        missing += [
            f"{field} of one of {entries}"
            for entries, fields in _OF_EACH.items()
            for each in answer.get(entries, ())
            for field in fields
            if field not in each
        ]
        if missing:
            status = answer["ResponseMetadata"]["HTTPStatusCode"]
            raise self._no_s3(what, f"it answers {status} without {missing[0]}")

    def _no_s3(self, what: str, detail: str) -> StoreError:
        return StoreError(
            f"{self.shown}: {what}: what answers there is no S3: {detail}.",
            hint=f"Check registries.{self._key}.endpoint in params.yaml, and any proxy or login "
            "page in between.",
        )

    def _refusal(self, operation: str, error: Exception, what: str) -> StoreError | None:
        """Say what an answer means that waiting cannot change; None of what may pass."""
        from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415 - 0.1 s

        where = f"{self.shown}: {what}"
        if isinstance(error, ClientError):
            return self._refused(operation, error, where, what)
        kinds = {kind.__name__ for kind in type(error).__mro__}
        found = _failure(error)
        if found is not None and found.passing:
            return None
        if "ResponseParserError" in kinds:
            return self._no_s3(what, _said(error))
        if not isinstance(error, (BotoCoreError, OSError, ValueError)):
            return None
        text = _said(error)
        hint = f"Check registries.{self._key} in params.yaml, and AWS_* and ~/.aws/config."
        if kinds & _NO_LOGIN:
            text = f"there is no login to AWS: {text}"
            hint = f"Set {CREDENTIALS} or sign in (aws sso login)."
        elif found is not None:
            text = f"its certificate is not trusted: {text}"
            hint = "AWS_CA_BUNDLE names the file of a private CA."
        return StoreError(f"{where}: {text}.", hint=hint)

    def _refused(
        self, operation: str, error: Exception, where: str, what: str
    ) -> StoreError | None:
        """Say what a status of 4xx or 5xx means."""
        code, status = _code(error), _status(error)
        if operation == "head_object" and code.isdigit():
            # An answer to HEAD has no body that would say which error it is.
            code = self._why(code, what)
        found = _failure(error)
        known = self._known(code, status, error, where)
        if known is not None or (found is not None and found.passing):
            return known
        if code in {"", "404"}:
            return self._no_s3(what, f"{status}, and not in S3's words")
        detail = f"{code}: {_said(error)}"
        return StoreError(f"{where} was refused: {detail}.", hint=self._look_hint())

    def _known(
        self, code: str, status: int | None, error: Exception, where: str
    ) -> StoreError | None:
        """Return the error of each code that has a next step of its own."""
        if code in _ABSENT:
            return AbsentError(f"{where}: there is none.")
        if status == 412 or code == "PreconditionFailed":  # noqa: PLR2004 - HTTP's
            return ConditionError(f"{where}: somebody else wrote it.")
        if status == 501 or code == "NotImplemented":  # noqa: PLR2004 - HTTP's
            return UnknownRequestError(
                f"{where}: the service does not know this request.",
                hint="Use an S3 service that has conditional writes and multipart uploads.",
            )
        if status == 416 or code == "InvalidRange":  # noqa: PLR2004 - HTTP's
            return RangeError(f"{where}: it is shorter than that.")
        text, hint = self._sentence(code)
        return StoreError(f"{where}: {text}: {_said(error)}.", hint=hint) if text else None

    def _sentence(self, code: str) -> tuple[str, str]:
        """Return what a code means, and the next step; empty if it says enough itself."""
        declared = f"registries.{self._key}"
        sentences = {
            frozenset({"NoSuchBucket"}): (
                f"there is no bucket {self.bucket}",
                f"Create it, or correct {declared} in params.yaml.",
            ),
            _EXPIRED: (
                "the login has expired",
                f"Renew {CREDENTIALS} and repeat the command: what was sent is not sent again.",
            ),
            _WRONG_LOGIN: ("the login is wrong", f"Check {CREDENTIALS} in the environment."),
            frozenset({"RequestTimeTooSkewed"}): (
                "the clocks of this machine and of the service differ too much",
                "Set the clock of this machine (timedatectl status).",
            ),
            _OTHER_REGION: (
                "the bucket is in another region",
                f"Set {declared}.region in params.yaml.",
            ),
            _DENIED: (
                "this login may not do that",
                f"Allow {_PERMISSIONS}; without s3:ListBucket, what is missing looks forbidden.",
            ),
            _FULL: (
                "the store is full",
                f"Make room there; `fleet gc --registry {self._key}` says what nobody needs.",
            ),
            frozenset({"EntityTooLarge"}): (
                "the file is too large for it",
                f"Set {declared}.max_file_mib in params.yaml to its limit.",
            ),
        }
        return next((text for codes, text in sentences.items() if code in codes), ("", ""))

    def _why(self, code: str, what: str) -> str:
        """
        Find out which error an answer to HEAD meant, by a request whose answer has a body.

        A 404 is a missing object once the bucket has been seen.
        """
        if code not in {"400", "403", "404"} or (code == "404" and self._seen):
            return "NoSuchKey" if code == "404" else code
        from botocore.exceptions import ClientError  # noqa: PLC0415 - 0.1 s

        try:
            answer = self._client(patient=False).list_objects_v2(Bucket=self.bucket, MaxKeys=1)
        except ClientError as error:
            told = _code(error)
            return "AccessDenied" if told == "403" else told
        self._require_s3("list_objects_v2", answer, what)
        if code == "404":
            self._seen = True
            return "NoSuchKey"
        return "AccessDenied" if code == "403" else code

    def _look_hint(self) -> str:
        return f"Check registries.{self._key} in params.yaml, and the log of the service."


def server_time(answer: Answer) -> datetime:
    """Return the time of the service, by which its objects are dated; ours may be wrong."""
    text = answer["ResponseMetadata"]["HTTPHeaders"].get("date", "")
    try:
        return email.utils.parsedate_to_datetime(text).astimezone(UTC)
    except (ValueError, TypeError, OverflowError):
        return datetime.now(UTC)


def _connect(registry: Registry, read_timeout_s: int) -> Answer:
    import botocore.config  # noqa: PLC0415 - 0.2 s, and only for s3: registries
    import botocore.session  # noqa: PLC0415 - the same

    session = botocore.session.Session()
    session.register_component("data_loader", _descriptions())
    declared = session.get_scoped_config()
    options: dict[str, Any] = {
        "connect_timeout": _CONNECT_TIMEOUT_S,
        "read_timeout": read_timeout_s,
        "max_pool_connections": _CONNECTIONS,
        # Attempts are counted in one place, not in two that multiply.
        "retries": {"total_max_attempts": 1},
        "tcp_keepalive": True,
        # We hash what we read; a wrong body has to get as far as that.
        "response_checksum_validation": "when_required",
        "user_agent_extra": f"gguf-fleet/{__version__}",
    }
    # Many services are confused by the checksums in trailers that botocore sends since 1.36, or
    # break the connection on a refusal while they arrive. Content-MD5, which they all know, is
    # always sent. Whoever needs it otherwise says so in the environment or in ~/.aws/config.
    name = "request_checksum_calculation"
    if not os.environ.get(f"AWS_{name.upper()}") and name not in declared:
        options[name] = "when_required"
    # Services other than AWS seldom have a DNS name for each bucket.
    if registry.endpoint and "addressing_style" not in (declared.get("s3") or {}):
        options["s3"] = {"addressing_style": "path"}
    region = registry.region or session.get_config_variable("region")
    if region is None and registry.endpoint:
        region = "us-east-1"  # what services without regions expect in a signature
    return session.create_client(
        "s3",
        region_name=region,
        endpoint_url=registry.endpoint,
        config=botocore.config.Config(**options),
    )


@functools.cache
def _descriptions() -> Answer:
    """Return botocore's descriptions of services: a megabyte of JSON, read once."""
    import botocore.loaders  # noqa: PLC0415 - with the rest of it

    return botocore.loaders.create_loader()


def _failure(error: Exception) -> transfer.Failure | None:
    """Read an exception as `transfer` does, and S3's own words for what may pass."""
    found = transfer.failure_of(error)
    if found is not None and found.status and not found.passing and _code(error) in _PASSING:
        return transfer.Failure(
            status=found.status,
            passing=True,
            retry_after_s=found.retry_after_s,
            detail=found.detail,
        )
    return found


def _code(error: Exception) -> str:
    return str(getattr(error, "response", {}).get("Error", {}).get("Code", ""))


def _status(error: Exception) -> int | None:
    answered: dict[str, Answer] = getattr(error, "response", {}).get("ResponseMetadata", {})
    return answered.get("HTTPStatusCode")


def _said(error: Exception) -> str:
    """Return the words of the service, or of botocore, in one line that is safe to show."""
    told = getattr(error, "response", {})
    text = told.get("Error", {}).get("Message", "") if isinstance(told, dict) else ""
    return console.clean(" ".join((text or str(error)).split()))[:200].rstrip(".")
