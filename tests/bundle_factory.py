"""
Bundles and plans of a small fleet, made of the records of tiny-llama that git holds.

Nothing is measured: the texts are those of a real run, put onto another machine or into another
model, with every md5 of dvc.lock made right again as DVC computes it. So a test breaks one thing,
and everything else is what a run leaves.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sample
import yaml
from sample import SAMPLE

from pipelines import bundle, declaration, lock_entries, machine, params
from pipelines.bundle import git_blob
from pipelines.ci_records import BundleRecord, Leg, ModelPlan, PlanRecord
from pipelines.coverage import folder_md5
from pipelines.layout import Layout

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pipelines.params import Declaration

ROOT = Path(__file__).resolve().parent.parent
MODEL = "tiny-llama"
TWIN = "twin"
HOST = "local"
BASE = "b" * 40
HEAD = "a" * 40
FACTS = {
    "cpu": {"model": "A Processor", "cores_count": 8},
    "memory_gib": 64,
    "gpus": [],
}  # fmt: skip
_TRACKED = ("params.yaml", "dvc.yaml", "dvc.lock", "corpora", "modelfiles", "results")


def fleet(root: Path) -> Layout:
    """Copy what git holds of the sample: the declaration, the graph, the lock and the records."""
    root.mkdir()
    sample.take(root, *_TRACKED, frozen=True)
    return Layout(root)


def commit(root: Path) -> str:
    """Make a folder a repository with one commit; return it."""
    author = ("-c", "user.name=Test", "-c", "user.email=test@example.invalid")
    for argv in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "fleet"]):
        subprocess.run(["git", *author, *argv], cwd=root, check=True)
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=root, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def with_twin(at: Layout) -> Layout:
    """Declare a second model, equal to the first but for its name; no record of it is there."""
    told = yaml.safe_load(at.params.read_text())
    told["models"][TWIN] = _renamed(told["models"][MODEL])
    told["quants"] |= _renamed(told["quants"])
    at.params.write_text(yaml.safe_dump(told, sort_keys=False))
    return at


def with_host(at: Layout, host: str) -> Layout:
    """Declare a second host that is measured."""
    told = yaml.safe_load(at.params.read_text())
    told["hosts"][host] = {"memory_mib": 4096, "runs_on": ["self-hosted", host]}
    at.params.write_text(yaml.safe_dump(told, sort_keys=False))
    return at


def _renamed(value: Any) -> Any:
    return json.loads(json.dumps(value).replace(MODEL, TWIN))


def bundle_of(at: Layout, model: str = MODEL, host: str = HOST, **facts: Any) -> BundleRecord:
    """
    Compose the bundle of a run on another machine than the one that the records in git are of.

    Args:
        at: The checkout whose declaration holds.
        model: tiny-llama, or its twin.
        host: That was measured.
        facts: What the machine is, beside `FACTS`.
    """
    made = _made(at.params.read_text(), model, host, json.dumps({**FACTS, **facts}))
    return BundleRecord.model_validate_json(made)


@functools.cache
def _held() -> str:
    """Return the bundle that git holds of tiny-llama."""
    origin = Layout(SAMPLE)
    declared = declaration.load(origin.params)
    return bundle.from_git(origin, declared, MODEL, host=HOST, head=HEAD).model_dump_json()


@functools.cache
def _made(params_text: str, model: str, host: str, facts: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "params.yaml"
        path.write_text(params_text)
        declared = declaration.load(path)
    own = json.loads(facts)
    hw_id = machine.facts_id(own)
    held = _held()
    fields = json.loads(held.replace(json.loads(held)["machine_id"], hw_id).replace(MODEL, model))
    fields["files"] = _for_hosts(fields["files"], declared, model)
    fields |= {
        "model": model,
        "host": host,
        "primary": host == bundle.primary_host(declared, model),
        "machine_id": hw_id,
        "machine": json.dumps({"schema_version": 1, "hw_id": hw_id, **own}, indent=2) + "\n",
        "times_s": {f"fetch@{model}": 1.5, f"choose@{model}": 0.5},
    }
    return relocked(BundleRecord(**fields), declared).model_dump_json()


def _for_hosts(files: dict[str, str], declared: Declaration, model: str) -> dict[str, str]:
    """Let the choice and the load test speak of every host of the model as of the first."""
    routed = list(params.routed_hosts(declared, model))
    for name in (f"results/{model}/choice.json", f"results/{model}/load-test.json"):
        told = json.loads(files[name])
        if "candidates" in json.dumps(told):
            first = told["hosts"][0]
            told["hosts"] = [{**copy.deepcopy(first), "host": one} for one in routed]
        else:
            told["slos"] = dict.fromkeys(routed, told["slos"][HOST])
            told["verdicts"] = [
                {**one, "host": host} for host in routed for one in told["verdicts"]
            ]
            for test in told["winners"]:
                _for_each_host(test, routed)
        files[name] = json.dumps(told, indent=2, ensure_ascii=False) + "\n"
    return files


def _for_each_host(test: dict[str, Any], hosts: list[str]) -> None:
    test["gates"] = [{**gate, "host": host} for host in hosts for gate in test["gates"]]
    for run in test["runs"]:
        run["good_count"] = dict.fromkeys(hosts, run["good_count"][HOST])
    test["hosts"] = hosts


def relocked(record: BundleRecord, declared: Declaration) -> BundleRecord:
    """Make every md5, size and parameter of the entries of dvc.lock right again."""
    lock = copy.deepcopy(record.lock)
    slices = {
        f"{stage}@{key}": json.loads(one.model_dump_json())
        for (stage, key), one in declaration.slices(declared).items()
    }
    texts = {**record.files, "work/machine.json": record.machine}
    texts["work/toolchain.json"] = record.toolchain
    for name, entry in lock.items():
        if name in slices:
            entry["params"] = dict.fromkeys(entry["params"], slices[name])
        for out in entry["outs"]:
            _relock(out, texts)
    written = {out["path"]: out for entry in lock.values() for out in entry["outs"]}
    for entry in lock.values():
        for dep in entry.get("deps", []):
            _relock(dep, texts)
            if dep["path"] in written:
                dep.update(written[dep["path"]])
            elif dep["md5"].endswith(".dir"):
                below = _below(dep["path"], written)
                if below:
                    dep["md5"] = folder_md5({name: out["md5"] for name, out in below.items()})
                    dep["size"] = sum(out["size"] for out in below.values())
                    dep["nfiles"] = len(below)
    return record.model_copy(update={"lock": lock})


def _below(path: str, written: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {
        name.removeprefix(f"{path}/"): out
        for name, out in written.items()
        if name.startswith(f"{path}/")
    }


def _relock(each: dict[str, Any], texts: Mapping[str, str]) -> None:
    if each["path"] in texts:
        data = texts[each["path"]].encode()
        each["md5"] = hashlib.md5(data).hexdigest()
        each["size"] = len(data)


def edited(record: BundleRecord, at: Layout, path: str, **changes: Any) -> BundleRecord:
    """Change fields of one record of a bundle, and everything that names its md5."""
    full = f"results/{record.model}/{path}"
    told = json.loads(record.files[full]) | changes
    files = record.files | {full: json.dumps(told, indent=2, ensure_ascii=False) + "\n"}
    return relocked(record.model_copy(update={"files": files}), declaration.load(at.params))


def plan_of(at: Layout, *legs: tuple[str, str], **changes: Any) -> PlanRecord:
    """
    Compose the plan that asks for some legs.

    Args:
        at: The checkout whose declaration holds.
        legs: (model, host) of each.
        changes: Fields that are others.
    """
    declared = declaration.load(at.params)
    models = list(dict.fromkeys(model for model, _ in legs))
    fields: dict[str, Any] = {
        "base": BASE,
        "head": HEAD,
        "params_blob": git_blob(at.params.read_bytes()),
        "models": tuple(
            ModelPlan(model=model, change="changed", line=7, covered=False) for model in models
        ),
        "legs": tuple(
            Leg(
                host=host,
                models=(model,),
                runs_on=declared.hosts[host].runs_on or ("gpu",),
                primary=host == bundle.primary_host(declared, model),
                timeout_minutes=60,
            )
            for model, host in legs
        ),
    }
    return PlanRecord(**(fields | changes))


def save(directory: Path, *records: BundleRecord) -> Path:
    """Write bundles as a download of artifacts leaves them: a folder for each."""
    for number, record in enumerate(records):
        path = directory / f"bundle-{number}" / bundle.name_of(record)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(record.model_dump_json())
    directory.mkdir(exist_ok=True)
    return directory


def stages_of(at: Layout) -> dict[str, Any]:
    """Return the entries of a checkout's dvc.lock."""
    return lock_entries.parsed((at.root / "dvc.lock").read_text())
