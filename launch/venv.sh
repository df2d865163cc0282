# `zeda_venv [EXTRAS]` makes or updates .venv in the checkout with this package and its extras (such as `test` or
# `test,quickstart`), and exports PYTHON. The second call with the same setup.cfg takes no time. To be sourced.
#
#   ZEDA_VENV=DIR      use that environment as it is: nothing is installed into it
#   ZEDA_TORCH=SPEC    what pip installs as PyTorch (default below). With NVIDIA GPUs install the build that fits
#                      your driver into .venv first (or use ZEDA_VENV): a PyTorch that is there is kept.
#   PYTHON=FILE        the Python 3.11+ that makes .venv
# Where pip looks for packages is pip's own configuration (pip.conf, PIP_* variables).

# Plain `torch` would let pip fetch a newer one with gigabytes of CUDA libraries: pinned, and installed first.
: "${ZEDA_TORCH:=torch==2.13.0}"

_zeda_base_python() {
  local candidate
  for candidate in ${PYTHON:+"$PYTHON"} python3 python3.12 python3.11 python3.13; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  echo "error: no Python 3.11 or newer on PATH; set PYTHON" >&2
  return 2
}

_zeda_install() { # venv extras root stamp
  local python="$1/bin/python" base
  if ! "$python" -m pip --version >/dev/null 2>&1; then
    base=$(_zeda_base_python) || return
    echo "making $1 with $base" >&2
    "$base" -m venv "$1" || return
  fi
  local pip=("$python" -m pip install -qq --disable-pip-version-check) # errors only
  if ! "$python" -c 'import torch' 2>/dev/null; then
    echo "installing $ZEDA_TORCH" >&2
    "${pip[@]}" "$ZEDA_TORCH" || return
  fi
  echo "installing this package${2:+ with [$2]}" >&2
  "${pip[@]}" --editable "$3${2:+[$2]}" || return
  : >"$4"
}

zeda_venv() { # extras
  local extras=${1:-} root venv stamp
  root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
  venv=${ZEDA_VENV:-$root/.venv}
  if [[ -n ${ZEDA_VENV:-} ]]; then
    [[ -x $venv/bin/python ]] || { echo "error: ZEDA_VENV=$venv has no bin/python" >&2; return 2; }
  else
    # The stamp is written last and names what was installed: a broken installation is done again.
    stamp=$venv/.zeda-$extras-$(cat "$root/setup.cfg" "$root/pyproject.toml" <(echo "$root") | sha256sum | cut -c 1-16)
    mkdir -p "$venv"
    if [[ ! -e $stamp ]]; then
      if command -v flock >/dev/null; then # two runs at a time: the second waits
        (flock 9 && { [[ -e $stamp ]] || _zeda_install "$venv" "$extras" "$root" "$stamp"; }) 9>"$venv/.lock" || return
      else
        _zeda_install "$venv" "$extras" "$root" "$stamp" || return
      fi
    fi
  fi
  export PYTHON="$venv/bin/python"
}
