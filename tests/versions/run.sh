#!/usr/bin/env bash
# Run the quick tests with other versions of Python and torch, each in an environment of its own (5 GB with CUDA builds).
# Usage: run.sh FOLDER PYTHON:TORCH ... [-- PYTEST_ARGUMENTS], for example run.sh build/versions 3.12:2.11.0
# Ends with 1 if a test fails, with 69 if a version could not be tested here.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit
folder=$1
shift
pairs=()
while (($#)) && [[ $1 != -- ]]; do
    pairs+=("$1")
    shift
done
[[ ${1:-} == -- ]] && shift
code=0
summary=()

# The interpreter of a version: on the path, or one that pyenv has installed.
interpreter() {
    command -v "python$1" && "python$1" -c '' 2>/dev/null && return
    compgen -G "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1.*/bin/python$1" | tail -1 | grep .
}

for pair in "${pairs[@]}"; do
    python=${pair%%:*} torch=${pair#*:}
    environment=$folder/$python-$torch
    if ! found=$(interpreter "$python" | tail -1); then
        summary+=("Python $python, torch $torch: not tested, no python$python here")
        code=$((code ? code : 69))
        continue
    fi
    if [[ ! -e $environment/.installed ]]; then
        rm -rf "$environment"
        "$found" -m venv "$environment"
        # The version may be a build for CPUs from a local index, whose version begins like it.
        # The interpreter of Triton 3.6, which torch 2.11 is tied to, takes int() of arrays: NumPy 2.3 warns, 2.5 fails.
        constraint=numpy
        [[ $torch == 2.11.* ]] && constraint='numpy<2.4'
        if ! "$environment/bin/pip" install --quiet "torch==$torch" ||
            ! "$environment/bin/pip" install --quiet --editable '.[dev]' "$constraint"; then
            summary+=("Python $python, torch $torch: not tested, cannot be installed")
            code=$((code ? code : 69))
            continue
        fi
        touch "$environment/.installed"
    fi
    if HYPOTHESIS_PROFILE=quick DS_ACCELERATOR=cpu "$environment/bin/python" -m pytest -n "${WORKERS:-2}" --dist loadfile \
        --no-loadscope-reorder --ignore tests/faults --ignore tests/null_gpu \
        -m "not cluster and not nightly and not full and not serial" "$@"; then
        summary+=("Python $python, torch $torch: passed")
    else
        summary+=("Python $python, torch $torch: FAILED")
        code=1
    fi
done
printf '%s\n' "${summary[@]}"
exit $code
