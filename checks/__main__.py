"""
Hold workflows, actions and what stands beside them against rules, schemas and linters.

And the links of the pages against what is there.

    python -m checks            say what is wrong, as file:line: [rule] cause; exit 1 if anything is
    python -m checks --rules    list the rules, each with its reason, as docs/workflow-checks.md

Without Go or Node it says what was skipped; with CI in the environment that is exit 7.
"""

from __future__ import annotations

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from checks import files, installed, linters, pages, policy, rules_repository
from pipelines import console, wording
from pipelines.errors import FleetError

if TYPE_CHECKING:
    from checks.files import Finding, Repository


def main() -> int:
    """Run every check, or list the rules."""
    parser = argparse.ArgumentParser(description="Check workflows and actions.")
    parser.add_argument("--rules", action="store_true", help="list the rules and why they exist")
    if parser.parse_args().rules:
        for rule in policy.rules().values():
            console.out(f"| `{rule.name}` | {rule.why} |")
        return 0
    repository = files.read(installed.ROOT)
    found = policy.judge(repository) + pages.judge(installed.ROOT)
    # What is no YAML would only be told again, by each in its own words.
    programs = () if repository.broken else linters.ALL
    with ThreadPoolExecutor() as pool:
        answers = pool.map(lambda name: asked(name, repository), programs)
        for findings, skipped in answers:
            found += findings
            if skipped and os.environ.get("CI"):
                # Green has to mean that everything was looked at.
                raise installed.MissingError(skipped)
            if skipped:
                console.warn(skipped)
    for finding in sorted(found, key=lambda each: (each.file, each.line)):
        console.error(finding.problem.text, where=finding.problem)
    if unowned := rules_repository.unowned(repository):
        console.warn(unowned)
    if unread := pages.unread(installed.ROOT):
        console.info(f"no page of the template leads to {wording.first_few(unread)}")
    if found:
        return 1
    console.out(
        f"{len(repository.workflows)} workflows and {len(repository.actions)} actions: "
        f"{len(policy.rules())} rules and {len(linters.ALL)} programs find nothing; "
        f"the links of {len(pages.reachable(installed.ROOT))} pages lead somewhere"
    )
    return 0


def asked(name: str, repository: Repository) -> tuple[list[Finding], str]:
    """Return what one program finds, and a line if it could not be asked."""
    try:
        return list(linters.ALL[name](repository)), ""
    except installed.MissingError as missing:
        return [], f"{name} was skipped: {missing.message}"
    except FleetError as error:
        raise type(error)(f"{name}: {error.message}", hint=error.hint) from error


if __name__ == "__main__":
    try:
        code = main()
    except FleetError as error:
        console.error(error.message)
        code = error.exit_code
    sys.exit(code)
