#!/usr/bin/env bash
# Install SLURM and munge for the test cluster, from Debian. Does nothing where they are installed.
set -euo pipefail

PATH=$PATH:/usr/sbin:/sbin
missing=()
command -v slurmctld sbatch >/dev/null || missing+=(slurm-wlm)
command -v munged >/dev/null || missing+=(munge)
((${#missing[@]})) || exit 0

if ((EUID)) || ! command -v apt-get >/dev/null; then
    echo "The test cluster needs ${missing[*]}, and only root on Debian or Ubuntu can install it from here" >&2
    exit 1
fi

# Start no daemon at installation: the tests start their own, on their own ports, in their own folder.
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
    trap 'rm -f "$policy"' EXIT
fi

export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${missing[@]}"
