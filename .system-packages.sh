#!/usr/bin/env bash
# Install the system packages that are missing, with apt, as root or with sudo: .system-packages.sh [PYTHON [slurm]]
# Without `slurm` those that FFCV is built from. With it those of the tests' own SLURM, which may be missing in the end.
set -euo pipefail
python=${1:-python3}
what=${2:-ffcv}

as_root=()
can_install() {
  command -v apt-get >/dev/null || return 1
  [ "$(id -u)" -ne 0 ] || return 0
  as_root=(sudo)
  sudo -n true 2>/dev/null || { [ -t 0 ] && command -v sudo >/dev/null; }
}

if [ "$what" = slurm ]; then
  packages=(munge slurmctld slurmd slurm-client slurmdbd mariadb-server-core mariadb-client-core)
  PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin
  missing=()
  for program in munged slurmctld slurmd slurmdbd sbatch mariadbd mariadb-install-db my_print_defaults; do
    command -v "$program" >/dev/null || missing+=("$program")
  done
  [ ${#missing[@]} -eq 0 ] && exit 0
  # No package may be removed for it (a MySQL server would be), and none of the daemons starts as a system service.
  if can_install && echo "installing SLURM for the tests: ${packages[*]}" && "${as_root[@]}" sh -ec '
    apt-get update -qq
    if [ ! -e /usr/sbin/policy-rc.d ]; then
      trap "rm -f /usr/sbin/policy-rc.d" EXIT
      printf "#!/bin/sh\nexit 101\n" >/usr/sbin/policy-rc.d
      chmod +x /usr/sbin/policy-rc.d
    fi
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends --no-remove "$@" >/dev/null
  ' sh "${packages[@]}"; then
    exit 0
  fi
  echo "no SLURM here (${missing[*]}), so the tests on it are skipped; to have it: apt-get install ${packages[*]}" >&2
  exit 0
fi

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "vitpa needs Python 3.11 or newer; $python is $("$python" --version 2>&1). Try: make PYTHON=python3.12" >&2
  exit 1
}

missing=()
command -v g++ >/dev/null || missing+=(g++)
command -v pkg-config >/dev/null || missing+=(pkg-config)
pkg-config --exists opencv4 2>/dev/null || missing+=(libopencv-dev)
pkg-config --exists libturbojpeg 2>/dev/null || missing+=(libturbojpeg0-dev)
"$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
"$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' ||
  missing+=(python3-dev)
[ ${#missing[@]} -eq 0 ] && exit 0

if can_install; then
  echo "installing system packages: ${missing[*]}"
  "${as_root[@]}" apt-get update -qq
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
  exit 0
fi
cat >&2 <<MESSAGE
FFCV is built from source and needs system packages that are missing here: ${missing[*]}
Ask an administrator for: apt-get install g++ pkg-config libopencv-dev libturbojpeg0-dev python3-venv python3-dev
or use conda (no root needed): see "Without root" in README.md.
MESSAGE
exit 1
