#!/usr/bin/env bash
# Installs what tests/slurm needs (slurmctld, slurmd, srun, munged) where that is possible: Debian or Ubuntu, as root.
# Exit code 0 if it is there at the end. Configures nothing: the tests bring their own daemons, ports and keys. (Debian
# starts munge's service on machines that have an init; the tests do not use it.)
set -euo pipefail
there() {
  local program
  for program in munged slurmctld slurmd sbatch srun; do
    PATH=$PATH:/usr/sbin:/sbin command -v "$program" >/dev/null || return 1
  done
}
there && exit
if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
  echo "Slurm is not installed; as root on Debian or Ubuntu: apt-get install slurm-wlm munge" >&2
  exit 1
fi
export DEBIAN_FRONTEND=noninteractive
quick=(-o Acquire::Retries=1 -o Acquire::http::Timeout=30)
packages=(slurmctld slurmd slurm-client munge)
{ apt-get -qq "${quick[@]}" update && apt-get -qq "${quick[@]}" install --no-install-recommends -y "${packages[@]}"; } >&2 || true
there || { echo "Slurm could not be installed: see the lines above" >&2; exit 1; }
