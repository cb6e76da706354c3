"""What GitHub may answer other than yes."""

from __future__ import annotations

from pipelines.errors import RetryLaterError, StoreError


class GitHubError(StoreError):
    """
    GitHub refused a request, and waiting does not change that.

    Attributes:
        status: HTTP status; 0 if the request could not even be made.
        method: Of the request.
        path: Of the request, below the address of the API.
    """

    def __init__(
        self, message: str, *, status: int = 0, method: str = "", path: str = "", hint: str = ""
    ) -> None:
        """Describe one refusal."""
        super().__init__(message, hint=hint)
        self.status = status
        self.method = method
        self.path = path


class TooLargeError(GitHubError):
    """An answer has more bytes than any that makes sense; it was not read to its end."""


class MovedError(GitHubError):
    """
    A branch is not where it was: somebody pushed in between. Nothing of theirs was touched.

    Attributes:
        branch: Its name.
        found: The commit that it is at now; None if it is gone.
    """

    def __init__(self, message: str, *, branch: str, found: str | None, hint: str = "") -> None:
        """Describe where the branch is."""
        super().__init__(message, status=409, hint=hint)
        self.branch = branch
        self.found = found


class UnknownOutcomeError(RetryLaterError):
    """
    Nobody knows whether a request was carried out: the answer to it was lost.

    Only of requests that must not simply be repeated, a new comment for instance: who made it
    looks at what is there, and decides.
    """


class BusyError(RetryLaterError):
    """
    GitHub cannot do it right now, and the caller wanted to hear of it rather than wait.

    Attributes:
        pause_s: How long to wait.
    """

    def __init__(self, message: str, pause_s: float) -> None:
        """Describe what failed, and for how long."""
        super().__init__(message, hint="Run the job again later.")
        self.pause_s = pause_s
