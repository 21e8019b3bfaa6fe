#!/usr/bin/env bash
# Install the CUDA build of torch in an environment of its own (3 GB of downloads) and build the null device for it.
# Usage: install.sh FOLDER [TORCH_VERSION]. Does nothing where both are there. Exit code 69: the download is not possible.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=$1
torch=${2:-2.13.0}

command -v g++ >/dev/null || {
    if ((EUID)) || ! command -v apt-get >/dev/null; then
        echo "the null device needs a C++ compiler (g++), and only root on Debian or Ubuntu can install it from here" >&2
        exit 1
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends g++
}
if [[ ! -e $folder/.installed ]]; then
    rm -rf "$folder"
    ${PYTHON:-python3} -m venv "$folder"
    # ===: the version as published. Also a local index may hold a build for CPUs, whose version only begins like it.
    if ! "$folder/bin/pip" install --quiet "torch===$torch"; then
        echo "the CUDA build of torch $torch cannot be downloaded here: nothing was tested" >&2
        exit 69
    fi
    "$folder/bin/pip" install --quiet --editable "$here/../..[generation]"
    "$here/build.sh" "$folder/bin/python"
    touch "$folder/.installed"
elif [[ ! -e $here/build/libnullcuda.so ]]; then
    "$here/build.sh" "$folder/bin/python"
fi
