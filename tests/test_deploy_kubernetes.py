"""What deploy/kubernetes promises: ARC's charts with our values, held against what takes them."""

from __future__ import annotations

import functools
import gzip
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import helm_rendering
import jsonschema  # type: ignore[import-untyped] # it has no types
import pytest
import referencing
import yaml

from checks import installed

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parent.parent
DEPLOYED = ROOT / "deploy/kubernetes"
Manifest = dict[str, Any]


def documents(text: str) -> list[Manifest]:
    """Return the manifests of a file, none of them empty."""
    return [each for each in yaml.load_all(text, Loader=yaml.CSafeLoader) if each is not None]


def every() -> list[Manifest]:
    """Return all that would be applied to a cluster: both charts, and what they stand on."""
    texts = [helm_rendering.kept(name)[1] for name in helm_rendering.CHARTS]
    texts.append((DEPLOYED / "cluster.yaml").read_text())
    return [each for text in texts for each in documents(text)]


def of_kind(kind: str) -> list[Manifest]:
    """Return the manifests of a kind."""
    return [each for each in every() if each["kind"] == kind]


def pod() -> Manifest:
    """Return what a pod of a job is."""
    (scale_set,) = of_kind("AutoscalingRunnerSet")
    found: Manifest = scale_set["spec"]["template"]["spec"]
    return found


# --- the schemas ------------------------------------------------------------------------------


@functools.cache
def _folder() -> Path:
    try:
        return installed.validators() / installed.KUBERNETES
    except installed.MissingError as missing:
        pytest.skip(missing.message)


def _closed(schema: Any) -> Any:
    """Refuse fields that the resource does not name: the cluster would drop them without a word."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _closed(value) for key, value in schema.items()}
    if isinstance(made.get("properties"), dict) and "additionalProperties" not in made:
        made["additionalProperties"] = False
    return made


def flaws(manifest: Manifest) -> list[str]:
    """Say what Kubernetes 1.37, or ARC's own resource, does not take of a manifest."""
    group, _, version = manifest["apiVersion"].rpartition("/")
    if group == "actions.github.com":
        packed = helm_rendering.ARC / "autoscalingrunnerset.json.gz"
        schema = _closed(json.loads(gzip.decompress(packed.read_bytes())))
        # What every resource has is said elsewhere.
        schema["properties"]["metadata"] = {"type": "object"}
        found = list(jsonschema.Draft7Validator(schema).iter_errors(manifest))
        # A pod is a pod: what a definition of 2026 may lack, the cluster knows.
        pods = [manifest["spec"]["template"]]
        return [
            *(each.message for each in found),
            *(flaw for each in pods for flaw in _core("podtemplatespec-v1", each)),
        ]
    short = group.partition(".")[0]
    return _core("-".join(filter(None, (manifest["kind"].lower(), short, version))), manifest)


@functools.cache
def _validator(name: str) -> jsonschema.Draft202012Validator:
    schema, definitions = (
        json.loads((_folder() / f"{each}.json").read_text()) for each in (name, "_definitions")
    )
    registry: Any = referencing.Registry()
    for each in (schema, definitions):
        registry = referencing.Resource.from_contents(each) @ registry
    return jsonschema.Draft202012Validator(schema, registry=registry)


def _core(name: str, value: Manifest) -> list[str]:
    return [f"{each.json_path}: {each.message}" for each in _validator(name).iter_errors(value)]


def test_the_rendering_is_of_these_values_and_these_charts() -> None:
    """An old one is known as such without Helm."""
    for name in helm_rendering.CHARTS:
        made_from, _ = helm_rendering.kept(name)
        assert made_from == helm_rendering.digest(name), (
            "values or charts changed: python tests/helm_rendering.py"
        )


def test_helm_renders_the_same_again_and_refuses_values_that_contradict_themselves(
    tmp_path: Path,
) -> None:
    """By Helm's own engine, where it is built."""
    try:
        helm = helm_rendering.program()
    except installed.MissingError as missing:
        pytest.skip(missing.message)
    if helm is None:
        pytest.skip("Helm's engine is not built here; FLEET_TEST_HELM=1 builds it, in 80 s")
    for name in helm_rendering.CHARTS:
        done = helm_rendering.render(helm, name)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == helm_rendering.kept(name)[1]
    values = (DEPLOYED / "host-values.yaml").read_text()
    for there, planted, words in (
        ("maxRunners: 1", "maxRunners: 0", "maxRunners has to be greater or equal to minRunners"),
        ("desk]  ", "'']  ", "scaleSetLabels contains an empty string"),
        ("githubConfigUrl: ", "githubConfigUrl: ''  #", "githubConfigUrl is required"),
        ("runnerScaleSetName: gguf-desk", f"runnerScaleSetName: {'x' * 46}", "up to 45 characters"),
    ):
        assert there in values
        (tmp_path / "values.yaml").write_text(values.replace(there, planted))
        refused = helm_rendering.render(helm, "host", tmp_path / "values.yaml")
        assert refused.returncode == 1
        assert words in refused.stderr


def test_a_cluster_takes_every_field_of_every_manifest() -> None:
    """Strictly, so that a slip is no field that is dropped; planted slips are found."""
    manifests = every()
    assert len(manifests) > 12
    for each in manifests:
        assert flaws(each) == [], (each["kind"], each["metadata"]["name"])
    for kind, path, wrong in (
        ("AutoscalingRunnerSet", ("spec", "maxRunner"), 1),
        ("AutoscalingRunnerSet", ("spec", "template", "spec", "nodeSelectors"), {}),
        ("AutoscalingRunnerSet", ("spec", "template", "spec", "containers"), [{"image": "x"}]),
        ("PersistentVolumeClaim", ("spec", "accessMode"), "ReadWriteOnce"),
        ("NetworkPolicy", ("spec", "egress"), {}),
        ("Deployment", ("spec", "template", "spec", "containers", "0", "securityContext"), "none"),
    ):
        (manifest,) = (each for each in every() if each["kind"] == kind)
        place: Any = manifest
        for key in path[:-1]:
            place = place[int(key) if key.isdigit() else key]
        place[path[-1]] = wrong
        assert flaws(manifest), path


# --- what the pods may ------------------------------------------------------------------------


def specs() -> Iterator[tuple[str, Manifest]]:
    """Yield every pod that these files make."""
    (scale_set,) = of_kind("AutoscalingRunnerSet")
    (controller,) = of_kind("Deployment")
    yield "a job", scale_set["spec"]["template"]["spec"]
    yield "the listener", scale_set["spec"]["listenerTemplate"]["spec"]
    yield "the controller", controller["spec"]["template"]["spec"]


def unrestricted(spec: Manifest) -> list[str]:
    """Say which rules of the level `restricted` a pod breaks (Pod Security Standards)."""
    outer = spec.get("securityContext", {})
    found = [key for key in ("hostNetwork", "hostPID", "hostIPC") if spec.get(key)]
    allowed = {"configMap", "emptyDir", "persistentVolumeClaim", "secret", "projected", "name"}
    found += [f"volume {each['name']}" for each in spec.get("volumes", []) if each.keys() - allowed]
    for each in [*spec.get("initContainers", []), *spec["containers"]]:
        inner = each.get("securityContext", {})
        both = {**outer, **inner}
        if inner.get("allowPrivilegeEscalation") is not False or inner.get("privileged"):
            found.append(f"{each['name']}: privileges")
        if inner.get("capabilities") != {"drop": ["ALL"]}:
            found.append(f"{each['name']}: capabilities")
        if both.get("runAsNonRoot") is not True or not both.get("runAsUser"):
            found.append(f"{each['name']}: root")
        if both.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            found.append(f"{each['name']}: seccomp")
        found += [f"{each['name']}: port" for port in each.get("ports", []) if "hostPort" in port]
    return found


def test_every_pod_passes_the_level_that_its_namespace_enforces() -> None:
    """No root, no privilege, no folder of the host; a namespace without the level is none."""
    for name, spec in specs():
        assert unrestricted(spec) == [], name
    assert unrestricted({"containers": [{"name": "x"}], "hostNetwork": True}) != []
    for namespace in of_kind("Namespace"):
        assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for each in every():
        told = each["metadata"].get("namespace")
        assert told in {None, "gguf-fleet", "gguf-fleet-arc"}


def test_a_job_gets_no_key_of_the_cluster_or_of_github() -> None:
    """No account, no secret but the login of DVC's remote; the service account may nothing."""
    spec = pod()
    assert spec["automountServiceAccountToken"] is False
    assert spec["restartPolicy"] == "Never"
    text = json.dumps(spec)
    assert re.findall(r'"secretRef": \{"name": "([^"]+)"', text) == ["gguf-fleet-remote"]
    assert "secretKeyRef" not in text
    assert "gguf-fleet-app" not in text
    account = spec["serviceAccountName"]
    bindings = [each for each in every() if each["kind"].endswith("RoleBinding")]
    assert account not in {subject["name"] for each in bindings for subject in each["subjects"]}
    (policy,) = of_kind("NetworkPolicy")
    assert policy["spec"]["ingress"] == []
    assert policy["spec"]["podSelector"] == {}
    reached = [to for rule in policy["spec"]["egress"] for to in rule["to"]]
    blocked = next(to["ipBlock"]["except"] for to in reached if "ipBlock" in to)
    assert {"10.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.168.0.0/16"} <= set(blocked)


def test_two_measurements_never_share_a_card_and_no_limit_makes_it_another_machine() -> None:
    """One pod at a time, one card, one disk that is its own."""
    (scale_set,) = of_kind("AutoscalingRunnerSet")
    assert (scale_set["spec"]["minRunners"], scale_set["spec"]["maxRunners"]) == (1, 1)
    (runner,) = pod()["containers"]
    assert runner["name"] == "runner"
    assert runner["resources"]["limits"] == {"nvidia.com/gpu": 1}
    (claim,) = of_kind("PersistentVolumeClaim")
    (volume,) = of_kind("PersistentVolume")
    assert claim["spec"]["accessModes"] == volume["spec"]["accessModes"] == ["ReadWriteOncePod"]
    assert claim["spec"]["volumeName"] == volume["metadata"]["name"]
    assert volume["spec"]["claimRef"]["name"] == claim["metadata"]["name"]
    (mounted,) = [each for each in pod()["volumes"] if each["name"] == "fleet"]
    assert mounted["persistentVolumeClaim"] == {"claimName": claim["metadata"]["name"]}
    (terms,) = volume["spec"]["nodeAffinity"]["required"]["nodeSelectorTerms"]
    assert terms["matchExpressions"][0]["values"] == list(pod()["nodeSelector"].values())


def test_a_pod_is_the_machine_that_the_hooks_of_deploy_runner_know() -> None:
    """Same variables, same folders in one mount, hooks of root's; labels as hosts: asks."""
    (runner,) = pod()["containers"]
    told = {each["name"]: each["value"] for each in runner["env"]}
    for line in (ROOT / "deploy/runner/runner.env").read_text().splitlines():
        name, _, value = line.partition("=")
        assert told[name] == value
    hooks = json.loads((ROOT / "deploy/runner/runner.json").read_text())
    assert runner["workingDir"] == hooks["work"]
    mounts = {each["mountPath"]: each for each in runner["volumeMounts"]}
    for place in (hooks["work"], *hooks["keep"], told["HOME"]):
        assert [m for m in mounts if place.startswith(f"{m}/")] == ["/srv/gguf-fleet"], place
    assert set(hooks["temp"]) - {"/dev/shm"} <= mounts.keys()
    (prepare,) = pod()["initContainers"]
    assert prepare["image"] == runner["image"]
    assert re.search(r"@sha256:[0-9a-f]{64}$", runner["image"])
    dockerfile = (ROOT / "deploy/docker/Dockerfile").read_text()
    assert Path(prepare["command"][0]).name in dockerfile
    # A ConfigMap's folder is links, which the hooks refuse; its one file is none.
    settings = mounts["/etc/gguf-fleet/runner.json"]
    assert (settings["subPath"], settings["readOnly"]) == ("runner.json", True)
    (scale_set,) = of_kind("AutoscalingRunnerSet")
    labels = scale_set["spec"]["runnerScaleSetLabels"]
    assert labels[0] == "self-hosted"
    readme = (DEPLOYED / "README.md").read_text()
    assert f"runs_on: [{', '.join(labels)}]" in readme
    named = (DEPLOYED / "host-values.yaml").read_text()
    assert named.count("# the host\n") == 4
    (chart,) = documents((helm_rendering.ARC / "gha-runner-scale-set/Chart.yaml").read_text())
    assert set(re.findall(r"--version (\S+)", readme)) == {chart["version"]}
