"""
What stands in for an action of others when `act` runs a workflow: `python stub.py NAME`.

Each does what the real one does for its callers, with files in $STUB_DIR in place of GitHub:
artifacts lie below artifacts/, and every call adds a line to calls.jsonl. Where the real one fails,
so does this. Names of inputs and outputs are those of .github/pins.yaml.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

HOME = Path(os.environ["STUB_DIR"])
ARTIFACTS = HOME / "artifacts"
_FORBIDDEN = re.compile(r'["/\\:<>|*?\r\n]')
# As actions/attest: it takes no more subjects in one attestation.
MOST_SUBJECTS = 1024


def main(name: str) -> None:
    """Do what the action does, and write down what it was asked for."""
    inputs = {key: value for key, value in json.loads(os.environ["INPUTS"]).items() if value}
    call = {
        "action": name,
        "job": os.environ.get("GITHUB_JOB", ""),
        "workflow": os.environ.get("GITHUB_WORKFLOW", ""),
        "inputs": inputs,
    }
    outputs, seen = _ACTIONS[name](inputs)
    with (HOME / "calls.jsonl").open("a", encoding="utf-8") as calls:
        calls.write(json.dumps({**call, **seen}) + "\n")
    with Path(os.environ["GITHUB_OUTPUT"]).open("a", encoding="utf-8") as file:
        file.writelines(f"{key}={value}\n" for key, value in outputs.items())


def fail(why: str) -> NoReturn:
    """End as the real action does: an annotation, and exit 1."""
    sys.stdout.write(f"::error::{why}\n")
    sys.exit(1)


def checkout(inputs: dict[str, str]) -> tuple[dict[str, str], dict[str, object]]:
    """Fetch one commit, as deep as asked, from the repository that the test gives."""
    if inputs.get("repository", os.environ["GITHUB_REPOSITORY"]) != os.environ["GITHUB_REPOSITORY"]:
        fail(f"the test has no repository {inputs['repository']}")
    place = Path(os.environ["GITHUB_WORKSPACE"]) / inputs.get("path", "")
    place.mkdir(parents=True, exist_ok=True)
    wanted = inputs.get("ref") or os.environ["GITHUB_SHA"]
    depth = inputs.get("fetch-depth", "1")
    git(place, "init", "-q", "-b", "none")
    origin = f"file://{os.environ['STUB_ORIGIN']}"
    git(place, "remote", "add", "origin", origin)
    how = [] if depth == "0" else [f"--depth={depth}"]
    ref = wanted if re.fullmatch("[0-9a-f]{40}", wanted) else f"refs/heads/{wanted}"
    git(place, "fetch", "-q", *how, "origin", ref)
    commit = git(place, "rev-parse", "FETCH_HEAD")
    if depth == "0":
        git(place, "fetch", "-q", "origin", "+refs/heads/*:refs/remotes/origin/*")
    git(place, "checkout", "-q", "--detach", commit)
    return {"commit": commit, "ref": wanted}, {"commit": commit}


def git(place: Path, *argv: str) -> str:
    """Run git; what it says goes into the log."""
    done = subprocess.run(["git", *argv], cwd=place, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        fail(f"git {' '.join(argv)} failed")
    return done.stdout.strip()


def upload(inputs: dict[str, str]) -> tuple[dict[str, str], dict[str, object]]:
    """Keep files under a name; a name is taken once."""
    name = inputs.get("name", "artifact")
    if _FORBIDDEN.search(name):
        fail(f"the artifact name is not valid: {name}")
    files = _found(inputs["path"])
    if not files:
        if inputs.get("if-no-files-found", "warn") == "error":
            fail(f"No files were found with the provided path: {inputs['path']}.")
        return {}, {"files": []}
    target = ARTIFACTS / name
    if target.exists():
        if inputs.get("overwrite") != "true":
            fail(f"an artifact with this name already exists: {name}")
        shutil.rmtree(target)
    parents = {file.parent for file in files}
    root = Path(os.path.commonpath(parents))
    for file in files:
        place = target / file.relative_to(root)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
    names = sorted(file.relative_to(root).as_posix() for file in files)
    number = str(len(list(ARTIFACTS.iterdir())))
    return {"artifact-id": number, "artifact-digest": "0" * 64}, {"files": names}


def _found(patterns: str) -> list[Path]:
    """List the files that an artifact is made of; hidden ones stay out, as by default."""
    found: set[Path] = set()
    for line in patterns.splitlines():
        for match in glob.glob(str(Path.cwd() / line.strip())):  # noqa: PTH207 - may be absolute
            path = Path(match)
            below = path.rglob("*") if path.is_dir() else [path]
            found |= {each for each in below if each.is_file() and not each.name.startswith(".")}
    return sorted(found)


def download(inputs: dict[str, str]) -> tuple[dict[str, str], dict[str, object]]:
    """Bring one artifact, or all that a pattern names: each into its own folder, or into one."""
    target = Path(os.environ["GITHUB_WORKSPACE"]) / inputs.get("path", "")
    have = sorted(path.name for path in ARTIFACTS.iterdir()) if ARTIFACTS.is_dir() else []
    if "name" in inputs:
        names = [name for name in have if name == inputs["name"]]
        if not names:
            fail(f"Unable to download artifact(s): Artifact not found for name: {inputs['name']}")
    else:
        names = fnmatch.filter(have, inputs.get("pattern", "*"))
    for name in names:
        alone = "name" in inputs or inputs.get("merge-multiple") == "true"
        target.mkdir(parents=True, exist_ok=True)
        shutil.copytree(ARTIFACTS / name, target if alone else target / name, dirs_exist_ok=True)
    return {"download-path": str(target)}, {"names": names}


def app_token(inputs: dict[str, str]) -> tuple[dict[str, str], dict[str, object]]:
    """Give the token of the test for the key of the test."""
    if not (inputs.get("client-id") or inputs.get("app-id")) or "private-key" not in inputs:
        fail("client-id and private-key are needed")
    token = os.environ.get("STUB_APP_TOKEN", "app-token-of-the-test")
    sys.stdout.write(f"::add-mask::{token}\n")
    return {"token": token, "installation-id": "1", "app-slug": "fleet-app"}, {}


def attest(inputs: dict[str, str]) -> tuple[dict[str, str], dict[str, object]]:
    """Write down what would be signed."""
    if "subject-checksums" not in inputs:
        fail("the test knows subject-checksums alone")
    path = Path(os.environ["GITHUB_WORKSPACE"]) / inputs["subject-checksums"]
    if not path.is_file():
        fail(f"{path} is not there")
    subjects = []
    for line in path.read_text().splitlines():
        found = re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line)
        if found is None:
            fail(f"no checksum: {line}")
        subjects.append({"sha256": found[1], "name": found[2]})
    if not 0 < len(subjects) <= MOST_SUBJECTS:
        fail(f"{len(subjects)} subjects")
    digest = hashlib.sha256(json.dumps(subjects).encode()).hexdigest()[:8]
    return {"attestation-id": digest, "attestation-url": "", "bundle-path": ""}, {
        "subjects": subjects
    }


_ACTIONS = {
    "actions/checkout": checkout,
    "actions/upload-artifact": upload,
    "actions/download-artifact": download,
    "actions/create-github-app-token": app_token,
    "actions/attest": attest,
}

if __name__ == "__main__":
    main(sys.argv[1])
