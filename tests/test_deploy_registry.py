"""What deploy/registry promises of its files; the tests of the stores show that they work."""

from __future__ import annotations

import re
import subprocess
from typing import TYPE_CHECKING

import pytest
import release_factory as factory
import requests
import yaml
from registry_servers import DEPLOYED, debian_program
from release_factory import MODEL

from pipelines import publishing
from pipelines.errors import FleetError
from pipelines.stores.oci import OciStore

if TYPE_CHECKING:
    from pathlib import Path

    from registry_servers import OciServer


def test_compose_runs_the_very_files_of_the_debian_way() -> None:
    """Every file that it mounts is here or is made by the README; images are pinned by digest."""
    told = yaml.safe_load((DEPLOYED / "compose.yaml").read_text())
    readme = (DEPLOYED / "README.md").read_text()
    for service in told["services"].values():
        assert re.fullmatch(r"[a-z]+:[0-9][a-z0-9.-]+@sha256:[0-9a-f]{64}", service["image"])
        # 127.0.0.1:5001 is the same for both, and out of reach for others.
        assert service["network_mode"] == "host"
        for volume in service["volumes"]:
            source = re.sub(r"\$\{NGINX_CONF:-(.*?)\}", r"\1", volume).partition(":")[0]
            name = source.removeprefix("./")
            assert (DEPLOYED / name).exists() or name in told["volumes"] or name in readme, volume
    assert "REGISTRY_HTTP_SECRET" in told["services"]["registry"]["environment"]


def test_the_registry_itself_is_on_loopback_alone() -> None:
    """Nobody gets past nginx; deletion is on, since a collection needs it."""
    told = yaml.safe_load((DEPLOYED / "registry.yml").read_text())
    assert told["http"]["addr"] == "127.0.0.1:5001"
    assert told["storage"]["delete"]["enabled"] is True
    for name in ("nginx.conf", "nginx-tls.conf", "nginx-read-only.conf"):
        assert "server 127.0.0.1:5001;" in (DEPLOYED / name).read_text()


def test_publishers_over_plain_http_are_on_this_machine() -> None:
    """A password crosses no network in clear; the read-only variant has no port for it."""
    plain = re.findall(r"listen ([^;]+);", (DEPLOYED / "nginx.conf").read_text())
    tls = re.findall(r"listen ([^;]+);", (DEPLOYED / "nginx-tls.conf").read_text())
    read_only = re.findall(r"listen ([^;]+);", (DEPLOYED / "nginx-read-only.conf").read_text())
    assert plain == ["5000", "127.0.0.1:5010"]
    assert tls == ["5000 ssl", "5010 ssl"]
    assert read_only == ["5000"]


def test_the_password_file_of_the_readme_is_what_nginx_reads(oci: OciServer) -> None:
    """The tests make theirs by the same command: it lets its owner in, and nobody else."""
    assert "openssl passwd -6" in (DEPLOYED / "README.md").read_text()
    url = f"http://{oci.push}/v2/"  # where clients log in
    assert requests.get(url, timeout=10).status_code == 401
    assert requests.get(url, auth=(oci.username, "wrong"), timeout=10).status_code == 401
    assert requests.get(url, auth=(oci.username, oci.password), timeout=10).status_code == 200


def test_without_the_password_the_publishers_port_reads_and_never_writes(oci: OciServer) -> None:
    """By method: GET and HEAD as at the other port; a running upload is its publisher's alone."""
    base = f"http://{oci.push}/v2/fleet/nothing"
    digest = f"sha256:{'0' * 64}"
    asked = {
        ("GET", "/tags/list"): 404,
        ("GET", "/manifests/stable"): 404,
        ("HEAD", f"/blobs/{digest}"): 404,
        ("POST", "/blobs/uploads/"): 401,
        ("GET", "/blobs/uploads/1"): 401,
        ("HEAD", "/blobs/uploads/1"): 401,
        ("PATCH", "/blobs/uploads/1"): 401,
        ("PUT", f"/blobs/uploads/1?digest={digest}"): 401,
        ("DELETE", "/blobs/uploads/1"): 401,
        ("POST", "/blobs/upl%6Fads/"): 401,
        ("PUT", "/manifests/stable"): 401,
        ("DELETE", f"/manifests/{digest}"): 401,
        ("DELETE", f"/blobs/{digest}"): 401,
        ("POST", "/tags/list"): 401,
    }
    for (method, path), status in asked.items():
        for login in (None, (oci.username, "wrong")):
            answer = requests.request(method, base + path, auth=login, timeout=10)
            assert answer.status_code == status, (method, path, login)
    assert requests.get(f"http://{oci.push}/v2/_catalog", timeout=10).status_code == 200


def test_a_host_reads_a_release_by_the_publishers_url_without_a_secret(
    oci: OciServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was published by login is read by `fleet` without one; a write is refused at once."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    declared = oci.registry()
    made = factory.composed(tmp_path / "files")
    ledger = factory.ledger(tmp_path)
    with monkeypatch.context() as publisher:
        for name, value in oci.environment("production").items():
            publisher.setenv(name, value)
        publishing.publish(
            made, OciStore("production", declared), ledger, stable="latest", by=factory.by()
        )
    host = OciStore("production", declared)

    id_, release, data = publishing.resolve(host, MODEL, "stable", ledger)

    assert (id_, release, data) == (made.id, made.release, made.data)
    for blob in made.blobs:
        host.prove_blob(MODEL, blob, lambda _: None)
    with pytest.raises(FleetError) as caught:
        host.prepare(MODEL)
    told = f"{caught.value.message} {caught.value.hint}"
    assert "401" in told
    assert "GGUF_FLEET_PRODUCTION_USERNAME" in told


def test_what_is_no_api_is_not_there(oci: OciServer) -> None:
    """Neither port shows anything but /v2/; running uploads are nobody's business."""
    assert requests.get(f"http://{oci.pull}/", timeout=10).status_code == 404
    assert requests.get(f"http://{oci.pull}/debug/vars", timeout=10).status_code == 404
    uploads = f"http://{oci.pull}/v2/fleet/x/blobs/uploads/1"
    assert requests.get(uploads, timeout=10).status_code == 403


def test_the_shell_of_the_readme_is_shell() -> None:
    """Each block parses."""
    bash = debian_program("bash", "bash")
    blocks = re.findall(r"```sh\n(.*?)```", (DEPLOYED / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 4
    for block in blocks:
        done = subprocess.run([bash, "-n"], input=block, text=True, timeout=30, check=False)
        assert done.returncode == 0, block
