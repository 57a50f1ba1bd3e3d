#!/usr/bin/env bash
# Sets up a fresh Debian 12 / Ubuntu 24.04 machine: `make setup` (called by `make demo` and `make test`).
#   1 Python environment in .venv  2 PyTorch, without CUDA packages unless there is an NVIDIA GPU  3 the other packages,
#   pinned by scripts/constraints.txt  4 a Vulkan that can render: the GPU's, else Mesa's software one (24.3 or newer).
# Debian packages are installed only when something is missing, with sudo when not root, and each one is named.
# When nothing is missing it ends within seconds. PYTHON=python3.12 and VENV=dir choose others.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
STAMP=$VENV/.cleanvla-setup
LOG=$VENV/setup.log
APT=/etc/apt
MESA_MIN=24.3
export PIP_DISABLE_PIP_VERSION_CHECK=1

[ "$(uname -s)" = Linux ] ||
  { echo "setup: this is $(uname -s), and only Linux is tested; use the Dockerfile" >&2; exit 1; }

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

can_render() { # opens the renderer that the environment would use; prints which, or why not
  "$VENV/bin/python" -c 'from scripts.renderer import check_renderer as c; print(c("cpu"))' 2>&1 |
    tail -n 1
}
nvidia_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; }

# --- Debian packages ---
apt_updated=""
apt_get() {
  local sudo=()
  if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || die "'apt-get $*' needs root, and there is no sudo; run it as root, then try again"
    sudo=(sudo)
  fi
  "${sudo[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq -o=Dpkg::Use-Pty=0 "$@" >/dev/null
}
apt_update() { [ -n "$apt_updated" ] || { apt_get update; apt_updated=1; }; }
apt_install() { # arguments: reason, then packages (and options) for apt-get install
  local reason=$1; shift
  command -v apt-get >/dev/null || die "$reason, and there is no apt-get here; install the equivalent of: $*"
  say "$reason: installing Debian packages: $*"
  apt_update
  apt_get install -y --no-install-recommends "$@"
}

# --- Mesa ---
mesa_candidate_ok() { # is the version that apt would install ($@: options) new enough?
  local version
  version=$(LC_ALL=C apt-get -s "$@" install mesa-vulkan-drivers 2>/dev/null |
    sed -n 's/^Inst mesa-vulkan-drivers .*(\([^ ]*\) .*/\1/p' | head -n 1)
  [ -z "$version" ] && version=$(dpkg-query -W -f '${Version}' mesa-vulkan-drivers 2>/dev/null || true)
  [ -n "$version" ] && dpkg --compare-versions "$version" ge "$MESA_MIN"
}
add_backports() { # adds the suite <codename>-backports, from wherever this machine already takes its Debian packages
  local suite=$1 release=$2 target text="" file suites
  for file in "$APT"/sources.list.d/*.sources "$APT"/sources.list "$APT"/sources.list.d/*.list; do
    [ -f "$file" ] || continue
    case $file in
      *.sources) # deb822: the first stanza that names the release, with only its suite and components changed
        target=$APT/sources.list.d/cleanvla-backports.sources
        suites="(^|\n)Suites:([^\n]*[ \t])?$release([ \t\n]|\$)"
        text=$(awk -v RS= -v suites="$suites" '$0 ~ suites {print; exit}' "$file" |
          sed -e '/^#/d' -e 's/^Types:.*/Types: deb/' -e "s/^Suites:.*/Suites: $suite/" \
            -e 's/^Components:.*/Components: main/') ;;
      *) # one line: deb [options] uri suite components
        target=$APT/sources.list.d/cleanvla-backports.list
        text=$(tr '\t' ' ' <"$file" | sed -nE "s/^ *deb +((\[[^]]*\] +)?[^ ]+) +$release .*/deb \1 $suite main/p" |
          head -n 1) ;;
    esac
    [ -n "$text" ] && break
  done
  [ -n "$text" ] || die "no apt source for $release found to copy; add the suite $suite to $APT and run this again"
  say "adding the suite $suite as $target (copied from $file)"
  local tee=(tee)
  [ "$(id -u)" -eq 0 ] || tee=(sudo tee)
  printf '%s\n' "$text" | "${tee[@]}" "$target" >/dev/null
  apt_updated=""; apt_update
}
install_mesa() {
  command -v apt-get >/dev/null ||
    die "no renderer works, and there is no apt-get here; install Mesa's software Vulkan (lavapipe) >= $MESA_MIN"
  local reason="no GPU can render here" id codename suite
  apt_update
  if ! mesa_candidate_ok; then
    id=$(. /etc/os-release; echo "$ID"); codename=$(. /etc/os-release; echo "${VERSION_CODENAME:-}")
    suite=$codename-backports
    [ "$id" = debian ] ||
      die "this system's Mesa is older than $MESA_MIN; use Debian 12 or Ubuntu 24.04, or a newer mesa-vulkan-drivers"
    mesa_candidate_ok -t "$suite" || add_backports "$suite" "$codename"
    mesa_candidate_ok -t "$suite" || die "the suite $suite has no mesa-vulkan-drivers >= $MESA_MIN"
    apt_install "$reason, and $codename's own Mesa is older than $MESA_MIN" -t "$suite" mesa-vulkan-drivers libvulkan1
  else
    apt_install "$reason" mesa-vulkan-drivers libvulkan1
  fi
}

# --- nothing to do? ---
wanted=$(cat pyproject.toml scripts/constraints.txt scripts/setup.sh | sha256sum | cut -d' ' -f1)
if [ "$(cat "$STAMP" 2>/dev/null)" = "$wanted" ] && can_render >/dev/null; then exit 0; fi
started=$SECONDS

# --- 1 Python environment and the libraries that its wheels load ---
missing=()
command -v "$PYTHON" >/dev/null || { apt_install "no $PYTHON" python3 python3-venv; PYTHON=python3; }
"$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' ||
  die "$("$PYTHON" --version) is not 3.11 or 3.12 (mplib has wheels for no other); make setup PYTHON=python3.12"
version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
"$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || missing+=("python$version-venv")
command -v git >/dev/null || missing+=(git) # mani_skill imports GitPython, which wants it
[ -e /etc/ssl/certs/ca-certificates.crt ] || missing+=(ca-certificates) # git only recommends what a fetch needs
libraries=$(/sbin/ldconfig -p) # no pipe: grep -q ends it early, and pipefail calls that a failure
for pair in libGL.so.1:libgl1 libgthread-2.0.so.0:libglib2.0-0 libX11.so.6:libx11-6; do # OpenCV and SAPIEN load these
  [[ $libraries == *"${pair%%:*}"* ]] || missing+=("${pair##*:}")
done
[ ${#missing[@]} -eq 0 ] || apt_install "libraries that Python packages load" "${missing[@]}"
if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
  say "creating $VENV with Python $version"
  "$PYTHON" -m venv --clear "$VENV"
fi
pip_install() { # what it prints goes to the log, and is shown when it fails
  "$VENV/bin/python" -m pip install "$@" >"$LOG" 2>&1 && return
  tail -n 20 "$LOG" >&2
  die "pip install $* failed; all of its output: $LOG"
}

# pip reads what a wheel needs without fetching the wheel only from 23.3 on, and Debian 12's is 23.0
"$VENV/bin/python" -c 'import sys, pip; sys.exit(tuple(map(int, pip.__version__.split(".")[:2])) < (23, 3))' ||
  pip_install --upgrade 'pip>=23.3'

# --- 2 PyTorch: on a machine without an NVIDIA GPU a build that pulls no CUDA packages ---
torch=$(grep '^torch==' scripts/constraints.txt)
if ! "$VENV/bin/python" -m pip show torch >/dev/null 2>&1; then
  index=()
  if ! nvidia_gpu; then
    # The plain index has a CPU build for some platforms and set-ups: ask what it would install before leaving it.
    pip_install --quiet --dry-run --report "$VENV/torch.json" "$torch"
    if grep -qE '"name": ?"(nvidia|cuda)-' "$VENV/torch.json"; then
      index=(--index-url https://download.pytorch.org/whl/cpu)
    fi
  fi
  say "installing $torch $(nvidia_gpu && echo 'for the NVIDIA GPU' || echo '(CPU build: no NVIDIA GPU found)')"
  pip_install "${index[@]}" "$torch"
fi

# --- 3 the other packages ---
say "installing the Python packages of pyproject.toml at the versions of scripts/constraints.txt"
pip_install --constraint scripts/constraints.txt --editable '.[dev]'

# --- 4 Vulkan ---
if ! can_render >/dev/null; then
  install_mesa
  can_render || die "the renderer still does not work; '$VENV/bin/python scripts/doctor.py' says more"
fi
say "renderer: $(can_render)"
printf '%s' "$wanted" >"$STAMP"
say "done in $((SECONDS - started)) s"
