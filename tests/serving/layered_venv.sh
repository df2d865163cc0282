# `layered_venv DIR BASE_PYTHON PIP_ARGUMENTS...` makes an environment on top of another one: it sees the packages of
# BASE_PYTHON's environment, and has its own before them. One that is there, made with the same arguments, is used as it
# is. To be sourced.

layered_venv() { # dir base_python pip_arguments...
  local venv=$1 base=$2 stamp
  shift 2
  stamp=$venv/.zeda-$(echo "$base $*" | sha256sum | cut -c 1-16)
  [[ ! -e $stamp ]] || return 0
  "$base" -m venv "$venv"
  local of='import sysconfig; print(sysconfig.get_path("purelib"))'
  # pip takes what it finds there for installed, and never removes it.
  "$base" -c "$of" >"$("$venv/bin/python" -c "$of")/zeda_base.pth"
  "$venv/bin/python" -m pip install -q --disable-pip-version-check "$@"
  : >"$stamp"
}
