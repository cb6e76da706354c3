"""
Real registry servers for the tests: each starts when a test asks for it and ends with the session.

    versitygw    S3 on a POSIX directory; conditional writes that hold under races
    moto_s3      S3 in this process; a second opinion, wrong in places that the tests name

A server listens on a free port of loopback, writes what it prints to a log, and is handed over when
it answers. It ends with its process group, however the session ends (pipelines.proc.background).
What cannot be had on a machine skips the tests that need it, with a line that says so.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import filelock
import pytest

from pipelines import atomic, params, proc, toolchain

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

_READY_WITHIN_S: Final = 60.0
_INSTALL_WITHIN_S: Final = 900.0


# --- what all servers share -------------------------------------------------------------------


def tools_home() -> Path:
    """Where programs that only tests need are kept: in the user's cache, once per version."""
    return toolchain.default_cache_root() / "test-tools"


def free_port() -> int:
    """Return a port of loopback that nobody listens on now; the next program may be faster."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def serving(
    argv: Sequence[str | Path],
    address: str,
    log: Path,
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Iterator[proc.Background]:
    """
    Run a server beside the block, from the moment at which it answers `address`.

    Any answer to a GET counts, a refusal too. One that ends, or that does not answer within a
    minute, fails the test with what it printed.
    """
    with proc.background(argv, log=log, env=env, cwd=cwd) as server:
        deadline = time.monotonic() + _READY_WITHIN_S
        while not _answers(address):
            ended = server.ended()
            if ended is not None or time.monotonic() > deadline:
                how = ended or f"did not answer within {_READY_WITHIN_S:.0f} s"
                pytest.fail(f"{argv[0]} {how}:\n{server.last_lines()}")
            time.sleep(0.02)
        yield server


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5):
            return True
    except urllib.error.HTTPError as refusal:
        refusal.close()
        return True
    except OSError:
        return False


def debian_program(name: str, package: str) -> str:
    """Return the path of a program that Debian packages; without it the test is skipped."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if found is None:
        pytest.skip(f"{name} is not installed (Debian: apt-get install {package})")
    return found


def go_program(module: str, version: str) -> Path:
    """
    Return a program of a Go module, installed at exactly this version into the user's cache.

    One process installs, the others wait; the final name appears when the program is whole. Without
    Go, or without a way to the module proxy, the test is skipped.
    """
    name = module.rsplit("/", 1)[1]
    home = tools_home() / f"{name}-{version}"
    home.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{home}.lock"):
        if not (home / name).is_file():
            _go_install(f"{module}@v{version}", home)
    return home / name


def _go_install(what: str, home: Path) -> None:
    go = shutil.which("go", path=f"{os.environ.get('PATH', '')}:/usr/local/go/bin")
    if go is None:
        pytest.skip(f"{what} is not installed, and there is no Go to install it with")
    work = home.with_name(f"{home.name}.build")
    atomic.remove(work)
    (work / "tmp").mkdir(parents=True)
    with atomic.replacing(home) as staging:
        # As little of the user's own Go as possible: what was downloaded is removed again.
        environment = {
            "GOBIN": str(staging),
            "GOPATH": str(work / "path"),
            "GOMODCACHE": str(work / "modules"),
            "GOCACHE": str(work / "cache"),
            "GOTMPDIR": str(work / "tmp"),
            "GOFLAGS": "-modcacherw",
            "GOWORK": "off",
        }
        done = subprocess.run(
            [go, "install", "-trimpath", "-ldflags=-s -w", what],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=_INSTALL_WITHIN_S,
            check=False,
        )
        if done.returncode != 0:
            pytest.skip(f"{what} cannot be installed: {done.stderr.strip()[-500:]}")
    atomic.remove(work)


# --- S3: versitygw and moto -------------------------------------------------------------------

# Of two creators 1.7.0 lets several win; 1.8.0 one.
VERSITYGW_VERSION: Final = "1.8.0"
_VERSITYGW: Final = "github.com/versity/versitygw/cmd/versitygw"


@dataclass(frozen=True, kw_only=True)
class S3Server:
    """
    An S3 service for tests.

    Attributes:
        kind: Its program and version, for test names and messages.
        endpoint: Its address.
        access_key: Of a user who may do everything.
        secret_key: That user's.
        directory: Where its objects lie as plain files, <directory>/<bucket>/<key>; None where they
            lie in memory.
        log: What it prints.
    """

    kind: str
    endpoint: str
    access_key: str
    secret_key: str
    directory: Path | None
    log: Path | None = None
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def environment(self) -> dict[str, str]:
        """What has to be in the environment to use it, and nothing of the user's own AWS."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self) -> Any:
        """Return a client of botocore with which a test looks at it, past the code under test."""
        import botocore.config  # noqa: PLC0415 - only tests of S3
        import botocore.session  # noqa: PLC0415 - the same

        return botocore.session.Session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=botocore.config.Config(s3={"addressing_style": "path"}),
        )

    def new_bucket(self) -> str:
        """Make a bucket that no other test has."""
        name = f"fleet-{os.getpid()}-{next(self._numbers)}"
        client = self.client()
        try:
            client.create_bucket(Bucket=name)
        finally:
            client.close()
        return name

    def registry(
        self, *, bucket: str = "", prefix: str = "", endpoint: str = ""
    ) -> params.Registry:
        """
        Declare a registry on it, as params.yaml would.

        Args:
            bucket: A bucket that exists; a new one if absent.
            prefix: Below which everything lies; the bucket's root if absent.
            endpoint: Another way to it, e.g. through a proxy that makes faults.
        """
        place = "/".join(filter(None, (bucket or self.new_bucket(), prefix)))
        return params.Registry(url=f"s3://{place}", endpoint=endpoint or self.endpoint)


@contextmanager
def versitygw_server(directory: Path) -> Iterator[S3Server]:
    """Run versitygw beside the block; its objects lie below `directory`."""
    program = go_program(_VERSITYGW, VERSITYGW_VERSION)
    root = directory / "objects"
    root.mkdir(parents=True)
    address = f"127.0.0.1:{free_port()}"
    # Not in argv, which everybody on the machine can read.
    keys = {"ROOT_ACCESS_KEY": "fleet-test", "ROOT_SECRET_KEY": "not-a-secret"}
    argv: list[str | Path] = [
        program,
        "--port",
        address,
        "--health",
        "/health",
        "--quiet",
        "posix",
        root,
    ]
    log = directory / "versitygw.log"
    with serving(argv, f"http://{address}/health", log, env=keys, cwd=directory):
        yield S3Server(
            kind=f"versitygw {VERSITYGW_VERSION}",
            endpoint=f"http://{address}",
            access_key=keys["ROOT_ACCESS_KEY"],
            secret_key=keys["ROOT_SECRET_KEY"],
            directory=root,
            log=log,
        )


@contextmanager
def moto_server() -> Iterator[S3Server]:
    """Run moto's S3 in threads of this process; its objects are gone with it."""
    import moto  # noqa: PLC0415 - a second, and only tests of S3
    from moto.server import ThreadedMotoServer  # noqa: PLC0415 - the same

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield S3Server(
            kind=f"moto {re.sub(r'[^0-9.]', '', moto.__version__)}",
            endpoint=f"http://{host}:{port}",
            access_key="fleet-test",
            secret_key="not-a-secret",
            directory=None,
        )
    finally:
        server.stop()


@pytest.fixture(scope="session")
def versitygw(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """The real S3 server on a POSIX directory."""
    with versitygw_server(tmp_path_factory.mktemp("versitygw")) as server:
        yield server


@pytest.fixture(scope="session")
def moto_s3() -> Iterator[S3Server]:
    """The S3 of moto."""
    with moto_server() as server:
        yield server


@pytest.fixture(params=["versitygw", "moto_s3"])
def s3_server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """Each S3 server in turn, with its credentials in the environment."""
    server: S3Server = request.getfixturevalue(request.param)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return server


# --- OCI: docker-registry behind nginx --------------------------------------------------------


# --- MLflow: a tracking server ----------------------------------------------------------------
