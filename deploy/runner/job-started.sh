#!/bin/bash
# ACTIONS_RUNNER_HOOK_JOB_STARTED: a job that this machine does not allow ends before its first step.
# What is allowed is said in runner.json beside this file; the reasons are in runner_hooks.py.
set -eu
PATH=/usr/sbin:/usr/bin:/sbin:/bin
unset LD_PRELOAD LD_LIBRARY_PATH LD_AUDIT BASH_ENV ENV
# -I: nothing of the job's folder, of its HOME or of PYTHON* is imported.
exec python3 -I "$(dirname -- "$(readlink -f -- "$0")")/runner_hooks.py" started
