"""
Real registry servers for the tests: each starts when a test asks for it and ends with the session.

    versitygw    S3 on a POSIX directory; conditional writes that hold under races
    moto_s3      S3 in this process; a second opinion, wrong in places that the tests name
    oci          docker-registry behind nginx with the files of deploy/registry; oci_tls over TLS
    mlflow_http  MLflow's tracking server on a database of its own

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
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import requests

from checks import installed
from pipelines import params, proc

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

_READY_WITHIN_S: Final = 180.0


# --- what all servers share -------------------------------------------------------------------


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

    Any answer to a GET counts, a refusal too. One that ends, or that does not answer within
    three minutes, as on a busy machine, fails the test with what it printed.
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
        # Whether it may be trusted is what tests are about.
        context = ssl._create_unverified_context() if address.startswith("https:") else None
        with urllib.request.urlopen(address, timeout=5, context=context):
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

    Without Go, or without a way to the module proxy, the test is skipped.
    """
    try:
        return installed.go_program(module, version)
    except installed.MissingError as missing:
        pytest.skip(missing.message)


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
        ca: Certificate of its authority, which nobody trusts by himself; None without TLS.
    """

    kind: str
    endpoint: str
    access_key: str
    secret_key: str
    directory: Path | None
    log: Path | None = None
    ca: Path | None = None
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
            verify=str(self.ca) if self.ca else None,
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
def versitygw_server(directory: Path, *, tls: bool = False) -> Iterator[S3Server]:
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
    ]
    ca = None
    if tls:
        ca = certificates(directory)
        argv += ["--cert", directory / "registry.crt", "--key", directory / "registry.key"]
    argv += ["posix", root]
    endpoint = f"{'https' if tls else 'http'}://{address}"
    log = directory / "versitygw.log"
    with serving(argv, f"{endpoint}/health", log, env=keys, cwd=directory):
        yield S3Server(
            kind=f"versitygw {VERSITYGW_VERSION}",
            endpoint=endpoint,
            access_key=keys["ROOT_ACCESS_KEY"],
            secret_key=keys["ROOT_SECRET_KEY"],
            directory=root,
            log=log,
            ca=ca,
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

DEPLOYED: Final = Path(__file__).resolve().parent.parent / "deploy/registry"


@dataclass(frozen=True, kw_only=True)
class OciServer:
    """
    docker-registry behind nginx, both with the files of deploy/registry.

    Attributes:
        kind: Programs and versions, for test names and messages.
        pull: host:port where everybody reads.
        push: host:port where publishers write, with the password; "" of a read-only one.
        direct: host:port of the registry itself, past nginx: no password, and no Ollama.
        username: Of the publisher.
        password: The publisher's.
        directory: Of the registry's storage.
        ca: Certificate of the authority that signed its own; None over plain HTTP.
        logs: Directory of what both print.
        configuration: The registry's.
    """

    kind: str
    pull: str
    push: str
    direct: str
    username: str
    password: str
    directory: Path
    ca: Path | None
    logs: Path
    configuration: Path
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def environment(self, name: str) -> dict[str, str]:
        """What has to be in the environment to publish to it as the registry `name`."""
        prefix = f"GGUF_FLEET_{name.upper().replace('-', '_')}"
        found = {f"{prefix}_USERNAME": self.username, f"{prefix}_PASSWORD": self.password}
        return found | ({"SSL_CERT_FILE": str(self.ca)} if self.ca else {})

    def registry(self, *, namespace: str = "", address: str = "") -> params.Registry:
        """
        Declare a registry on it, as params.yaml would.

        Args:
            namespace: A new one if absent.
            address: Another way to it, e.g. through a proxy that makes faults.
        """
        name = namespace or f"fleet-{os.getpid()}-{next(self._numbers)}"
        return params.Registry(url=f"oci://{address or self.push}/{name}")

    def collect_garbage(self) -> str:
        """Run the registry's own collection, as its operator does; return what it printed."""
        program = debian_program("docker-registry", "docker-registry")
        argv = [program, "garbage-collect", str(self.configuration)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
        return done.stdout


@contextmanager
def oci_server(
    directory: Path, *, variant: str = "nginx.conf", delete: bool = True
) -> Iterator[OciServer]:
    """
    Run docker-registry and nginx with the files of deploy/registry; ports and paths are ours.

    Args:
        directory: For everything that they write.
        variant: `nginx.conf`, `nginx-tls.conf` or `nginx-read-only.conf`.
        delete: Whether manifests may be deleted, as in the file.
    """
    registry = debian_program("docker-registry", "docker-registry")
    nginx = debian_program("nginx", "nginx-light")
    pull, push, direct = (f"127.0.0.1:{free_port()}" for _ in range(3))
    logs, storage, etc = directory / "logs", directory / "storage", directory / "etc"
    for each in (logs, storage, etc / "conf.d", etc / "snippets", etc / "tls", directory / "tmp"):
        each.mkdir(parents=True)
    ours = {
        "127.0.0.1:5001": direct,
        "listen 5000": f"listen {pull}",
        "listen 127.0.0.1:5010": f"listen {push}",
        "listen 5010": f"listen {push}",
        "/var/log/nginx": str(logs),
        "/var/lib/docker-registry": str(storage),
        **({} if delete else {"delete:\n    enabled: true": "delete:\n    enabled: false"}),
    }

    def deploy(name: str, target: Path) -> Path:
        text = (DEPLOYED / name).read_text()
        for theirs, own in ours.items():
            text = text.replace(theirs, own)
        target.write_text(text)
        return target

    for snippet in (DEPLOYED / "snippets").iterdir():
        deploy(f"snippets/{snippet.name}", etc / "snippets" / snippet.name)
    deploy(variant, etc / "conf.d/registry.conf")
    configuration = deploy("registry.yml", directory / "registry.yml")
    username, password = "publisher", "not-a-secret"
    told = _openssl("passwd", "-6", password).strip()
    (etc / "gguf-fleet.htpasswd").write_text(f"{username}:{told}\n")
    tls = variant == "nginx-tls.conf"
    ca = certificates(etc / "tls") if tls else None
    main = etc / "nginx.conf"
    main.write_text(_NGINX_MAIN.format(user=_NGINX_USER, directory=directory, logs=logs))
    secret = {"REGISTRY_HTTP_SECRET": "not-a-secret-either"}
    with (
        serving(
            [registry, "serve", configuration],
            f"http://{direct}/v2/",
            logs / "docker-registry.log",
            env=secret,
            cwd=directory,
        ),
        # Over TLS it answers this, too: that it wants TLS.
        serving(
            [nginx, "-p", etc, "-c", main, "-e", logs / "nginx-error.log"],
            f"http://{pull}/v2/",
            logs / "nginx.log",
            cwd=directory,
        ),
    ):
        yield OciServer(
            kind=f"docker-registry {_version_of(registry, '--version')} behind "
            f"nginx {_version_of(nginx, '-v')}",
            pull=pull,
            push="" if variant == "nginx-read-only.conf" else push,
            direct=direct,
            username=username,
            password=password,
            directory=storage,
            ca=ca,
            logs=logs,
            configuration=configuration,
        )


# What Debian's own nginx.conf does: run in the foreground of systemd, include conf.d.
_NGINX_MAIN: Final = """\
{user}
daemon off;
worker_processes 1;
pid {directory}/nginx.pid;
error_log {logs}/nginx-error.log info;
events {{ worker_connections 256; }}
http {{
    access_log {logs}/nginx-access.log;
    client_body_temp_path {directory}/tmp/body;
    proxy_temp_path {directory}/tmp/proxy;
    fastcgi_temp_path {directory}/tmp/fastcgi;
    uwsgi_temp_path {directory}/tmp/uwsgi;
    scgi_temp_path {directory}/tmp/scgi;
    include conf.d/*.conf;
}}
"""
# Below a directory of pytest, which nobody but its owner may enter.
_NGINX_USER: Final = "user root;" if os.geteuid() == 0 else ""


def certificates(directory: Path) -> Path:
    """
    Make an authority and a certificate of it for loopback, registry.crt and registry.key.

    Returns:
        The authority's own certificate, for those who are to trust it.
    """
    ca, key = directory / "ca.crt", directory / "ca.key"
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    _openssl(
        *("req", "-x509", *curve, "-keyout", key, "-out", ca, "-days", "2"),
        *("-subj", "/CN=gguf-fleet tests", "-addext", "keyUsage=critical,keyCertSign"),
    )
    _openssl(
        *("req", "-x509", *curve, "-keyout", directory / "registry.key", "-CA", ca),
        *("-CAkey", key, "-out", directory / "registry.crt", "-days", "2"),
        *("-subj", "/CN=localhost"),
        *("-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"),
        *("-addext", "basicConstraints=critical,CA:FALSE"),
    )
    return ca


def _openssl(*words: str | Path) -> str:
    program = debian_program("openssl", "openssl")
    argv = [program, *map(str, words)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True).stdout


def _version_of(program: str, option: str) -> str:
    told = subprocess.run(
        [program, option], capture_output=True, text=True, timeout=60, check=False
    )
    found = re.search(r"[0-9]+\.[0-9]+\.[0-9]+", told.stdout + told.stderr)
    return found[0] if found else "of an unknown version"


@pytest.fixture(scope="session")
def oci(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OciServer]:
    """Plain HTTP on loopback; publishers write with a password."""
    with oci_server(tmp_path_factory.mktemp("oci")) as server:
        yield server


@pytest.fixture(scope="session")
def oci_tls(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OciServer]:
    """Over TLS, with a certificate of a private authority."""
    with oci_server(tmp_path_factory.mktemp("oci-tls"), variant="nginx-tls.conf") as server:
        yield server


# --- MLflow: a tracking server ----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MlflowServer:
    """
    A running tracking server.

    Attributes:
        url: Its address.
        process: It; a test may end it.
        log: What it prints.
    """

    url: str
    process: proc.Background
    log: Path

    def forget_all(self) -> None:
        """Delete every registered model, so that the next test finds none."""
        api = f"{self.url}/api/2.0/mlflow/registered-models"
        told = requests.get(f"{api}/search", timeout=30).json()
        for model in told.get("registered_models", []):
            answer = requests.delete(f"{api}/delete", json={"name": model["name"]}, timeout=30)
            answer.raise_for_status()


@contextmanager
def mlflow_server(directory: Path, *, port: int | None = None) -> Iterator[MlflowServer]:
    """Run `mlflow server` on a database below `directory`, as its documentation says."""
    port = port or free_port()
    url = f"http://127.0.0.1:{port}"
    log = directory / "mlflow.log"
    argv = [
        *(sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)),
        *("--workers", "1", "--backend-store-uri", f"sqlite:///{directory}/mlflow.db"),
        *("--artifacts-destination", str(directory / "artifacts")),
    ]
    environment = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        # It runs jobs of prompts and judges otherwise, in further processes.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    with serving(argv, f"{url}/health", log, env=environment, cwd=directory) as process:
        yield MlflowServer(url=url, process=process, log=log)


@pytest.fixture(scope="session")
def mlflow_http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    """One tracking server for the session: it takes seconds to start, and half a gigabyte."""
    with mlflow_server(tmp_path_factory.mktemp("mlflow")) as server:
        yield server
