#!/bin/bash
# Sets up a machine that measures, as README.md beside this file says, step by step.
#
#   install.sh --repository OWNER/REPO --host NAME ...     says what it would change, and changes nothing
#   install.sh ... --apply                                 does it, as root; again: only what is missing
#   install.sh --check                                     looks at what is there
#   install.sh --uninstall [--purge] [--apply]             takes it back
set -euo pipefail
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export PATH LC_ALL=C.UTF-8
umask 022

# GitHub's runner, by what its release says; Settings > Actions > Runners shows the same for the newest.
readonly RUNNER_VERSION=2.338.0
readonly RUNNER_SHA256_X64=af4b794c1bc41d73d40535e3fe092a39f9679cd8d965954c2aca25a05ca41d32
readonly RUNNER_SHA256_ARM64=628b4a7258487b80c1d3c221095a7ded349f5ae0175fd3dfab708d07428f041b
readonly ETC=/etc/gguf-fleet
readonly SRV=/srv/gguf-fleet
readonly UNITS=/etc/systemd/system
readonly TMPFILES=/etc/tmpfiles.d/gguf-fleet.conf
readonly ACCOUNT=gguf-runner
# What llama.cpp, a Python environment and a few GGUFs need; a fleet needs more (`fleet doctor`).
readonly LEAST_FREE_GIB=40

here="$(dirname -- "$(readlink -f -- "$0")")"
readonly here
what=install
apply=false
purge=false
packages=true
level=2
repository=''
repository_id=''
host=''
labels=()
client_id=''
key=''
token_file=''
archive=''
runner_version="$RUNNER_VERSION"
runner_sha256=''
changes=0
warnings=0

usage() {
  cat <<TEXT
Usage: install.sh --repository OWNER/REPO --host NAME [options] [--apply]
       install.sh --check
       install.sh --uninstall [--purge] [--token-file FILE] [--apply]

Without --apply nothing is changed: each step says what it would do.

  --repository OWNER/REPO  whose jobs this machine takes; adds it if another one is allowed already
  --repository-id N        its number (gh api repos/OWNER/REPO --jq .id): a new repository of an old
                           name is refused then
  --host NAME              this machine's name in hosts: of params.yaml
  --label LABEL            of the runner, repeatable; default: gpu and the host's name
  --level 1|2              1: a runner that stays registered, private repositories only;
                           2: one registration for each job (default). README.md says what follows
  --client-id ID           level 2: of the App that registers (Administration: read and write)
  --key FILE               level 2: its private key
  --token-file FILE        level 1: the token of Settings > Actions > Runners > New self-hosted
                           runner; default: \$RUNNER_TOKEN, or it is asked for
  --archive FILE           GitHub's runner, already downloaded
  --runner-version V --runner-sha256 HEX
                           another runner than $RUNNER_VERSION
  --no-packages            install no Debian package; missing programs are named
  --purge                  with --uninstall: also the user, caches and everything in $SRV
TEXT
}

say() { printf '%s\n' "$@"; }
step() { printf '\n▸ %s\n' "$*"; }
same() { printf '  =  %s\n' "$*"; }
warn() {
  printf '  !  %s\n' "$*"
  warnings=$((warnings + 1))
}
fail() {
  printf 'install.sh: %s\n' "$1" >&2
  if [ "$#" -gt 1 ]; then printf '  next: %s\n' "$2" >&2; fi
  exit 2
}

# Says a change; true if it is to be made now.
change() {
  printf '  +  %s\n' "$*"
  changes=$((changes + 1))
  "$apply"
}

# A command of its own words.
run() {
  local words
  printf -v words '%q ' "$@"
  if change "${words% }"; then "$@"; fi
}

# A file of root's: the old one or the new one at any moment, never a half. What differs is shown, but for
# files with secrets in them.
put() {
  local source="$1" target="$2" mode="$3" there
  [ ! -L "$target" ] || fail "$target is a link" "Remove it: what decides about jobs has to be root's, and no link."
  [ ! -d "$target" ] || fail "$target is a folder" "Move it away: a file belongs there."
  if [ -e "$target" ]; then
    there="$(stat -c '%a %u %g' -- "$target")"
    if [ "$there" = "$mode 0 0" ] && cmp -s -- "$source" "$target"; then
      same "$target"
      return
    fi
    if [ "$mode" != 600 ] || [ "$target" = "$ETC/jit.json" ]; then
      diff -u --label "$target" --label "$target" -- "$target" "$source" | sed 's/^/     /' || true
    fi
  fi
  if change "write $target, mode $mode"; then
    install -m "$mode" -o root -g root -- "$source" "$target.fleet-new"
    mv -fT -- "$target.fleet-new" "$target"
  fi
}

# A file that is the operator's once it is there: never written over, but closed again.
keep() {
  local source="$1" target="$2" mode="$3"
  if [ -e "$target" ] || [ -L "$target" ]; then
    [ -f "$target" ] && [ ! -L "$target" ] || fail "$target is no regular file" "Move it away."
    if [ "$(stat -c '%a %u %g' -- "$target")" = "$mode 0 0" ]; then
      same "$target: kept as you have it"
    elif change "close $target: root's, mode $mode"; then
      chown root:root -- "$target"
      chmod "$mode" -- "$target"
    fi
  else
    put "$source" "$target" "$mode"
  fi
}

folder() {
  local target="$1" mode="$2" owner="$3"
  [ ! -L "$target" ] || fail "$target is a link" "Put the folder itself there, or mount the disk there."
  if [ -d "$target" ] && [ "$(stat -c '%a %U' -- "$target")" = "$mode $owner" ]; then
    same "$target"
  elif [ "$owner" = "$ACCOUNT" ] && [ "$(dirname -- "$target")" != "$SRV" ]; then
    # As who owns the folder above: a job could put a link there at the last moment.
    [ ! -d "$target" ] || [ "$(stat -c %U -- "$target")" = "$owner" ] ||
      fail "$target is $(stat -c %U -- "$target")'s" "chown -R -h $owner:$owner '$target', while no job runs"
    run runuser -u "$ACCOUNT" -- install -d -m "$mode" -- "$target"
  else
    run install -d -m "$mode" -o "$owner" -g "$owner" -- "$target"
  fi
}

options() {
  while [ "$#" -gt 0 ]; do
    case "$1" in
      --apply) apply=true ;;
      --check) what=check ;;
      --uninstall) what=uninstall ;;
      --purge) purge=true ;;
      --no-packages) packages=false ;;
      --help | -h)
        usage
        exit 0
        ;;
      --repository | --repository-id | --host | --label | --level | --client-id | --key | --token-file | \
        --archive | --runner-version | --runner-sha256)
        [ "$#" -ge 2 ] || fail "$1 needs a value" "install.sh --help"
        case "$1" in
          --repository) repository="$2" ;;
          --repository-id) repository_id="$2" ;;
          --host) host="$2" ;;
          --label) labels+=("$2") ;;
          --level) level="$2" ;;
          --client-id) client_id="$2" ;;
          --key) key="$2" ;;
          --token-file) token_file="$2" ;;
          --archive) archive="$2" ;;
          --runner-version) runner_version="$2" ;;
          *) runner_sha256="$2" ;;
        esac
        shift
        ;;
      *) fail "$1 is no option of this" "install.sh --help" ;;
    esac
    shift
  done
}

# Everything that can be known to be wrong before the first change.
judge_options() {
  local label
  [[ "$level" =~ ^[12]$ ]] || fail "--level is 1 or 2, not $level" "README.md, What this does not do"
  [[ "$repository" =~ ^[A-Za-z0-9][A-Za-z0-9_-]{0,99}/[A-Za-z0-9._-]{1,100}$ ]] ||
    fail "--repository has to be OWNER/REPO" "install.sh --help"
  [[ -z "$repository_id" || "$repository_id" =~ ^[1-9][0-9]{0,15}$ ]] ||
    fail "--repository-id has to be a number" "gh api repos/$repository --jq .id"
  [[ "$host" =~ ^[a-z0-9][a-z0-9_-]{0,40}$ ]] ||
    fail "--host has to be the key of this machine in hosts: of params.yaml" "such as --host desk"
  if [ "${#labels[@]}" -eq 0 ]; then labels=(gpu "$host"); fi
  for label in "${labels[@]}"; do
    [[ "$label" =~ ^[A-Za-z0-9._-]{1,63}$ ]] || fail "--label $label: letters, digits, . _ -" ""
    [ "$label" != self-hosted ] || fail "--label self-hosted is every runner's already" "Leave it out."
  done
  [[ "$runner_version" =~ ^2\.[0-9]{1,4}\.[0-9]{1,3}$ ]] ||
    fail "--runner-version has to be as 2.338.0" "Settings > Actions > Runners > New self-hosted runner"
  case "$(uname -m)" in
    x86_64) machine=x64 expected="$RUNNER_SHA256_X64" ;;
    aarch64) machine=arm64 expected="$RUNNER_SHA256_ARM64" ;;
    *) fail "GitHub has no runner for $(uname -m) that this knows" "README.md, by hand" ;;
  esac
  if [ -n "$runner_sha256" ]; then
    expected="$runner_sha256"
  elif [ "$runner_version" != "$RUNNER_VERSION" ]; then
    fail "--runner-version $runner_version needs --runner-sha256" \
      "Settings > Actions > Runners > New self-hosted runner shows both"
  fi
  [[ "$expected" =~ ^[0-9a-f]{64}$ ]] || fail "--runner-sha256 has to be 64 hexadecimal digits" ""
  [ -z "$archive" ] || [ -f "$archive" ] || fail "--archive $archive: there is no such file" ""
  if [ "$level" = 2 ]; then judge_app; fi
}

# Level 2: both there, or both left as they are.
judge_app() {
  if [ -n "$key" ]; then
    [ -r "$key" ] || fail "--key $key cannot be read" "The page of the App makes one: Private keys."
    grep -q 'PRIVATE KEY-----' -- "$key" || fail "--key $key is no private key" "It begins with -----BEGIN."
  elif [ ! -e "$ETC/app.pem" ]; then
    fail "level 2 needs --key" "Make an App: README.md, 4b; or --level 1 for a private repository."
  fi
  if [ -n "$client_id" ]; then
    [[ "$client_id" =~ ^[A-Za-z0-9._-]{4,60}$ ]] || fail "--client-id $client_id is none" "As Iv23..., on the App's page."
  elif [ ! -e "$ETC/jit.json" ]; then
    fail "level 2 needs --client-id" "It is on the page of the App: Iv23..."
  fi
}

look() {
  step "This machine"
  [ "$(uname -s)" = Linux ] || fail "this is no Linux" "README.md says what a runner needs."
  command -v systemctl >/dev/null || fail "there is no systemd" "deploy/docker or deploy/kubernetes."
  if "$apply"; then
    [ "$(id -u)" = 0 ] || fail "changes are root's to make" "sudo $0 ..."
    [ -d /run/systemd/system ] || fail "systemd does not run here" "In a container: deploy/docker, deploy/kubernetes."
  fi
  local missing=() free_gib place="$SRV"
  command -v git >/dev/null || missing+=(git)
  command -v cmake >/dev/null || missing+=(cmake)
  command -v c++ >/dev/null || missing+=(g++)
  command -v ninja >/dev/null || missing+=(ninja-build)
  command -v openssl >/dev/null || missing+=(openssl)
  command -v curl >/dev/null || missing+=(curl)
  command -v python3 >/dev/null || missing+=(python3)
  python3 -c 'import ensurepip' 2>/dev/null || missing+=(python3-venv)
  if [ "${#missing[@]}" -eq 0 ]; then
    same "every program that a job needs is there"
  elif "$packages" && command -v apt-get >/dev/null; then
    run apt-get update -qq
    run apt-get install -y -qq --no-install-recommends "${missing[@]}"
  else
    fail "programs are missing: ${missing[*]} (names of Debian's packages)" "Install them, then this again."
  fi
  command -v python3 >/dev/null ||
    fail "without python3 no more can be looked at" "sudo apt-get install python3, or the same command with --apply."
  if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    fail "Python 3.11 or newer is needed; this is $(python3 --version)" "Debian 12, Ubuntu 24.04 or newer."
  fi
  if nvidia-smi -L >/dev/null 2>&1; then
    same "NVIDIA's driver answers: $(nvidia-smi -L | head -n 1 | cut -c 1-60)"
  else
    warn "nvidia-smi does not answer: this becomes a machine without a card (memory_mib in hosts:)"
  fi
  while [ ! -e "$place" ]; do place="$(dirname -- "$place")"; done
  free_gib="$(($(stat -f -c '%a * %S' -- "$place") / 1073741824))"
  if [ "$free_gib" -lt "$LEAST_FREE_GIB" ]; then
    warn "$free_gib GiB are free below $SRV; mount a larger disk there before anything is in it"
  else
    same "$free_gib GiB are free below $SRV"
  fi
}

account() {
  step "The user $ACCOUNT, who may nothing: no login, no group, no cron"
  if getent passwd "$ACCOUNT" >/dev/null; then
    same "$ACCOUNT"
    local groups
    groups="$(id -Gn -- "$ACCOUNT")"
    [ "$groups" = "$ACCOUNT" ] || fail "$ACCOUNT is in the groups $groups" "gpasswd --delete $ACCOUNT GROUP"
  else
    run useradd --system --user-group --no-create-home --home-dir "$SRV/home" --shell /usr/sbin/nologin "$ACCOUNT"
  fi
  if [ -f /etc/cron.deny ] && grep -qxF -- "$ACCOUNT" /etc/cron.deny; then
    same "/etc/cron.deny"
  elif change "add $ACCOUNT to /etc/cron.deny"; then
    # Whose last line has no end denies nobody once another name is behind it.
    if [ -s /etc/cron.deny ] && [ -n "$(tail -c 1 /etc/cron.deny)" ]; then printf '\n' >>/etc/cron.deny; fi
    printf '%s\n' "$ACCOUNT" >>/etc/cron.deny
  fi
}

folders() {
  step "Folders: one file system, since _work, DVC's cache and a running Ollama share the bytes of a GGUF"
  local each
  [ ! -L "$SRV" ] || fail "$SRV is a link" "Mount the disk there instead."
  folder "$SRV" 755 root
  for each in home cache dvc dvc/cache; do folder "$SRV/$each" 755 "$ACCOUNT"; done
  folder "$ETC" 755 root
  folder "$ETC/dvc" 755 root
  if [ -d "$SRV" ]; then
    for each in home cache dvc dvc/cache runner; do
      [ ! -d "$SRV/$each" ] || [ "$(stat -c %d -- "$SRV/$each")" = "$(stat -c %d -- "$SRV")" ] ||
        warn "$SRV/$each is another file system: each GGUF is copied"
    done
  fi
}

# JSON of the template or of the machine, with what was asked for in it and nothing else changed.
rendered() {
  python3 -I - "$@" <<'PYTHON'
import json
import pathlib
import sys

kind, source, installed, out, repository, *rest = sys.argv[1:]
there = pathlib.Path(installed)
try:
    value = json.loads((there if there.exists() else pathlib.Path(source)).read_text(encoding="utf-8"))
    if kind == "hooks":
        known = value["repositories"]
        known.pop("OWNER/REPO", None)
        name = next((each for each in known if each.lower() == repository.lower()), repository)
        known[name] = int(rest[0]) if rest[0] else known.get(name)
        text = json.dumps(value, indent=2)
    else:
        client_id, host, *labels = rest
        value["repository"], value["name"] = repository, host
        value["labels"] = ["self-hosted", *labels]
        value["client_id"] = client_id or value["client_id"]
        text = json.dumps(value, indent=2)
except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    sys.exit(f"{installed}: {type(error).__name__}: {error}")
pathlib.Path(out).write_text(text + "\n", encoding="utf-8")
PYTHON
}

hooks() {
  step "The hooks, root's: which jobs this machine takes, and what is left of one afterwards"
  put "$here/job-started.sh" "$ETC/job-started.sh" 755
  put "$here/job-completed.sh" "$ETC/job-completed.sh" 755
  put "$here/runner_hooks.py" "$ETC/runner_hooks.py" 644
  rendered hooks "$here/runner.json" "$ETC/runner.json" "$scratch/runner.json" "$repository" "$repository_id" ||
    fail "$ETC/runner.json cannot be read" "Correct it, or move it away: it is written anew then."
  put "$scratch/runner.json" "$ETC/runner.json" 644
  if grep -q ": null" "$scratch/runner.json"; then
    warn "a repository is known by its name alone; --repository-id \"\$(gh api repos/$repository --jq .id)\" pins it"
  fi
  keep "$here/runner.env" "$ETC/runner.env" 600
  local line
  while IFS= read -r line; do
    if [ -r "$ETC/runner.env" ] && ! grep -qF -- "${line%%=*}=" "$ETC/runner.env"; then
      warn "$ETC/runner.env lacks $line"
    fi
  done <"$here/runner.env"
  keep "$here/dvc-config" "$ETC/dvc/config" 644
}

logs() {
  step "Logs and caches: how long they are kept"
  put "$here/tmpfiles.d/gguf-fleet.conf" "$TMPFILES" 644
}

card() {
  step "The card: the driver stays loaded, so that clocks and limits last"
  if ! command -v nvidia-smi >/dev/null; then
    same "no card, nothing to do"
    return
  fi
  put "$here/systemd/gguf-fleet-gpu.service" "$UNITS/gguf-fleet-gpu.service" 644
  started gguf-fleet-gpu
}

# GitHub's program, out of an archive whose digest is right, into a folder of root's.
unpacked() {
  local name="actions-runner-linux-$machine-$runner_version.tar.gz" staging="$SRV/.runner-new"
  local address="https://github.com/actions/runner/releases/download/v$runner_version/$name"
  change "unpack $name (sha256 ${expected:0:12}...), and what it needs by its installdependencies.sh" || return 0
  rm -rf --one-file-system -- "$staging"
  install -d -m 755 -- "$staging"
  if [ -n "$archive" ]; then
    cp -- "$archive" "$scratch/$name"
  else
    curl -fsSL --proto '=https' --retry 3 -o "$scratch/$name" -- "$address" ||
      fail "$address cannot be had" "Download it elsewhere: --archive FILE"
  fi
  if ! printf '%s  %s\n' "$expected" "$scratch/$name" | sha256sum --check --status; then
    rm -rf --one-file-system -- "$staging"
    fail "$name is not the file that was asked for: sha256 $(sha256sum <"$scratch/$name" | cut -c 1-64)" \
      "Download it again, or correct --runner-version and --runner-sha256."
  fi
  tar --extract --gzip --no-same-owner --file "$scratch/$name" --directory "$staging"
  # Root runs it here, where nobody else could have changed it.
  if "$packages"; then (cd -- "$staging" && ./bin/installdependencies.sh); fi
}

program() {
  local target="$SRV/runner" owner="$ACCOUNT" there=''
  if [ "$level" = 2 ]; then
    target="$SRV/template"
    owner=root
  fi
  step "GitHub's runner $runner_version in $target"
  # Not asked of the program itself: at level 1 a job could have changed it, and this is root.
  if [ -r "$ETC/runner.version" ]; then there="$(cat -- "$ETC/runner.version")"; fi
  if [ -e "$target/bin/Runner.Listener" ] && [ "$there" = "$runner_version level $level" ]; then
    same "$target"
    return
  fi
  if [ "$level" = 1 ] && systemctl is-active --quiet gguf-fleet-runner 2>/dev/null; then
    run systemctl stop gguf-fleet-runner
  fi
  unpacked
  if "$apply"; then
    if [ "$level" = 1 ] && [ -e "$target/.runner" ]; then
      # An update: registration and _work stay. As the runner's user, whose folder it is.
      chown -R --no-dereference "$ACCOUNT:$ACCOUNT" -- "$SRV/.runner-new"
      runuser -u "$ACCOUNT" -- cp -a --remove-destination -- "$SRV/.runner-new/." "$target/"
      rm -rf --one-file-system -- "$SRV/.runner-new"
    else
      chown -R --no-dereference "$owner:$owner" -- "$SRV/.runner-new"
      rm -rf --one-file-system -- "$target.old"
      if [ -e "$target" ]; then mv -- "$target" "$target.old"; fi
      mv -- "$SRV/.runner-new" "$target"
      rm -rf --one-file-system -- "$target.old"
    fi
    printf '%s level %s\n' "$runner_version" "$level" >"$scratch/version"
    install -m 644 -- "$scratch/version" "$ETC/runner.version"
  fi
}

# Level 1. The token is in the environment of one program, never among its words.
registered() {
  step "The registration, once: Settings > Actions > Runners shows $host afterwards"
  if [ -e "$SRV/runner/.runner" ]; then
    [ -f "$SRV/runner/.runner" ] && [ ! -L "$SRV/runner/.runner" ] ||
      fail "$SRV/runner/.runner is no regular file" "A job did that: install.sh --uninstall --purge --apply"
    if grep -q '"gitHubUrl"' -- "$SRV/runner/.runner" &&
      ! grep -qi "\"gitHubUrl\": *\"https://github.com/${repository//./\\.}/*\"" -- "$SRV/runner/.runner"; then
      fail "$SRV/runner is registered with another repository than $repository" \
        "One stays registered with one: install.sh --uninstall --apply, then this again; or --level 2."
    fi
    grep -q "\"agentName\": *\"$host\"" -- "$SRV/runner/.runner" ||
      fail "$SRV/runner is registered under another name than $host" "install.sh --uninstall --apply, then this again."
    same "$SRV/runner/.runner"
    return
  fi
  local joined token
  joined="$(IFS=, && printf '%s' "${labels[*]}")"
  change "config.sh --url https://github.com/$repository --name $host --labels $joined --disableupdate, as $ACCOUNT" ||
    return 0
  token="$(the_token)"
  (
    cd -- "$SRV/runner"
    export ACTIONS_RUNNER_INPUT_TOKEN="$token"
    runuser -u "$ACCOUNT" -- env HOME="$SRV/home" ./config.sh --unattended --url "https://github.com/$repository" \
      --name "$host" --labels "$joined" --disableupdate --replace
  ) || fail "GitHub did not take the registration" "The token is good for an hour: take a new one."
}

the_token() {
  local token="${RUNNER_TOKEN:-}"
  if [ -n "$token_file" ]; then
    token="$(tr -d '[:space:]' <"$token_file")"
  elif [ -z "$token" ] && [ -t 0 ]; then
    read -r -s -p "Token of Settings > Actions > Runners > New self-hosted runner: " token
    printf '\n' >&2
  fi
  [ -n "$token" ] || fail "there is no token" "--token-file FILE, or RUNNER_TOKEN in the environment."
  printf '%s' "$token"
}

one_job_each() {
  step "One registration for each job: the App's key is root's, and never near a job"
  put "$here/jit-prepare.sh" "$ETC/jit-prepare.sh" 755
  put "$here/jit_register.py" "$ETC/jit_register.py" 644
  if [ -e "$ETC/jit.json" ] && [ ! -r "$ETC/jit.json" ]; then
    fail "$ETC/jit.json is root's: this machine is set up already" "sudo $0 ..., also to look."
  fi
  rendered jit "$here/jit.json" "$ETC/jit.json" "$scratch/jit.json" "$repository" "$client_id" "$host" "${labels[@]}" ||
    fail "$ETC/jit.json cannot be read" "Correct it, or move it away: it is written anew then."
  if [ -e "$ETC/jit.json" ] && ! grep -qiF "\"repository\": \"$repository\"" -- "$ETC/jit.json"; then
    warn "from now on this machine registers with $repository, and no more with the one in $ETC/jit.json"
  fi
  put "$scratch/jit.json" "$ETC/jit.json" 600
  if [ -n "$key" ]; then
    put "$key" "$ETC/app.pem" 600
  else
    same "$ETC/app.pem"
  fi
}

# A unit runs now and after a restart. One that runs already is left alone: a job may be in it.
started() {
  if systemctl is-enabled --quiet "$1" 2>/dev/null && systemctl is-active --quiet "$1" 2>/dev/null; then
    same "$1 runs; what changed in its unit counts from its next start"
  else
    run systemctl daemon-reload
    run systemctl enable --now "$1"
  fi
}

stopped() {
  if systemctl is-enabled --quiet "$1" 2>/dev/null || systemctl is-active --quiet "$1" 2>/dev/null; then
    run systemctl disable --now "$1"
  fi
}

service() {
  local unit=gguf-fleet-runner-jit other=gguf-fleet-runner
  if [ "$level" = 1 ]; then
    unit=gguf-fleet-runner
    other=gguf-fleet-runner-jit
  fi
  step "The service $unit"
  if [ -e "$UNITS/$other.service" ]; then
    stopped "$other"
    run rm -f -- "$UNITS/$other.service"
    if [ "$level" = 2 ]; then
      warn "the runner that stayed registered is to be removed at Settings > Actions > Runners"
    fi
  fi
  put "$here/systemd/$unit.service" "$UNITS/$unit.service" 644
  started "$unit"
}

good() { printf '  ok %s\n' "$*"; }

check() {
  step "What is there"
  local unit found='' each
  if python3 -I - "$ETC" <<'PYTHON'; then
import pathlib
import sys

sys.path.insert(0, sys.argv[1])
sys.dont_write_bytecode = True
import runner_hooks

try:
    told = runner_hooks.read_config(pathlib.Path(sys.argv[1]) / "runner.json")
    for name in ("job-started.sh", "job-completed.sh", "runner_hooks.py"):
        runner_hooks._require_roots(pathlib.Path(sys.argv[1]) / name)
except runner_hooks.RefusedError as error:
    sys.exit(f"  !  {error}")
print(f"  ok jobs of {', '.join(told.repositories)} from {', '.join(told.workflows)}")
PYTHON
    :
  else
    warn "the hooks refuse every job"
  fi
  for unit in gguf-fleet-gpu gguf-fleet-runner gguf-fleet-runner-jit; do
    [ -e "$UNITS/$unit.service" ] || continue
    if [ "$unit" != gguf-fleet-gpu ]; then found="$found$unit"; fi
    if systemctl is-active --quiet "$unit" 2>/dev/null; then
      good "$unit runs"
    else
      warn "$unit does not run: journalctl -u $unit"
    fi
  done
  [ -n "$found" ] || warn "no unit of a runner is installed"
  for each in home cache dvc dvc/cache; do
    [ "$(stat -c %U -- "$SRV/$each" 2>/dev/null)" = "$ACCOUNT" ] || warn "$SRV/$each is not $ACCOUNT's"
  done
  if id -- "$ACCOUNT" >/dev/null 2>&1 && [ "$(id -Gn -- "$ACCOUNT")" = "$ACCOUNT" ]; then
    good "$ACCOUNT is in no other group"
  else
    warn "$ACCOUNT is missing, or in other groups"
  fi
  if [ "$warnings" -gt 0 ]; then
    say "" "$warnings thing(s) to look at."
    return 1
  fi
}

# A disk that is mounted there stays mounted; it is emptied, and so is the folder on which it is.
emptied() {
  if mountpoint --quiet -- "$SRV"; then
    run find "$SRV" -xdev -mindepth 1 -delete || warn "not everything below $SRV could be removed"
    warn "$SRV is a disk of its own: umount it, and take it out of /etc/fstab"
  else
    run rm -rf --one-file-system -- "$SRV" || warn "a part of $SRV is still there: another disk is mounted below it"
  fi
}

uninstall() {
  local unit
  if "$apply" && [ "$(id -u)" != 0 ]; then fail "changes are root's to make" "sudo $0 ..."; fi
  step "Services"
  for unit in gguf-fleet-runner gguf-fleet-runner-jit gguf-fleet-gpu; do
    [ -e "$UNITS/$unit.service" ] || continue
    stopped "$unit"
    run rm -f -- "$UNITS/$unit.service"
  done
  if "$apply"; then systemctl daemon-reload; fi
  step "Registration"
  if [ -e "$SRV/runner/.runner" ]; then
    if [ -n "$token_file$(printf '%s' "${RUNNER_TOKEN:-}")" ]; then
      if change "config.sh remove, as $ACCOUNT"; then
        (
          cd -- "$SRV/runner"
          ACTIONS_RUNNER_INPUT_TOKEN="$(the_token)"
          export ACTIONS_RUNNER_INPUT_TOKEN
          runuser -u "$ACCOUNT" -- env HOME="$SRV/home" ./config.sh remove
        ) || warn "GitHub did not take it back: remove it at Settings > Actions > Runners"
      fi
    else
      warn "remove it at Settings > Actions > Runners, or give --token-file"
    fi
    run rm -f -- "$SRV/runner/.runner" "$SRV/runner/.credentials" "$SRV/runner/.credentials_rsaparams"
  else
    same "none that stays"
  fi
  step "Settings, with the App's key and the remote's login"
  if [ -e "$ETC" ]; then run rm -rf --one-file-system -- "$ETC"; else same "none"; fi
  if [ -e "$TMPFILES" ]; then run rm -f -- "$TMPFILES"; fi
  step "Caches, models, the user"
  if "$purge"; then
    if [ -e "$SRV" ]; then emptied; fi
    if getent passwd "$ACCOUNT" >/dev/null; then run userdel "$ACCOUNT"; fi
    if [ -f /etc/cron.deny ] && grep -qxF -- "$ACCOUNT" /etc/cron.deny; then
      run sed -i "/^$ACCOUNT\$/d" /etc/cron.deny
    fi
  else
    same "$SRV and $ACCOUNT stay (--purge removes them)"
  fi
}

# As hosts: wants it: all cards together, or three quarters of main memory where no card answers.
memory_of_host() {
  local found
  found="$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null |
    awk '{sum += $1} END {print sum + 0}')" || true
  if [ "${found:-0}" -gt 0 ]; then
    printf 'vram_mib: %s' "$found"
  else
    awk '$1 == "MemTotal:" {printf "memory_mib: %d", int($2 / 1024 * 3 / 4 / 256) * 256}' /proc/meminfo
  fi
}

finish() {
  if "$apply"; then
    say "" "$changes change(s) made, $warnings warning(s)."
  else
    say "" "Nothing was changed. $changes change(s) would be, with the same command and --apply."
  fi
}

options "$@"
scratch="$(mktemp -d)"
readonly scratch
trap 'rm -rf -- "$scratch"' EXIT
if "$apply" && [ "$(id -u)" = 0 ]; then
  # Two at once would undo each other's folders. The kernel lets go of it, however this ends.
  exec 9>/run/lock/gguf-fleet-install.lock
  flock --nonblock 9 || fail "another install.sh is at work here" "Wait for it."
fi
case "$what" in
  check) check ;;
  uninstall)
    uninstall
    finish
    ;;
  *)
    judge_options
    look
    account
    folders
    hooks
    logs
    card
    program
    if [ "$level" = 1 ]; then registered; else one_job_each; fi
    service
    if "$apply"; then check || true; fi
    finish
    say "" "In params.yaml, by a pull request:" "" \
      "hosts:" "  $host: {$(memory_of_host), runs_on: [self-hosted$(printf ', %s' "${labels[@]}")]}" \
      "" "Then: Actions > runner health > Run workflow."
    ;;
esac
