#!/usr/bin/env bash
# Pack what half an hour on a GPU without a network needs, as build/gpu-day/: wheels for its Python and a small corpus.
# Usage: pack.sh PYTHON_VERSION, that of the machine with the GPU; its torch with CUDA must be installed there.
set -euo pipefail
cd "$(dirname "$0")/../.."
version=${1:-3.12}
folder=build/gpu-day
rm -rf "$folder"
mkdir -p "$folder/wheels"
# deepspeed has no wheel: it is built without its extensions, which are compiled at their first use.
DS_BUILD_OPS=0 .venv/bin/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$folder/wheels" "$(.venv/bin/pip freeze | grep -i '^deepspeed==')"
.venv/bin/pip freeze | grep -iE '^(megatron-core|zstandard|pydantic|pydantic-core|pydantic_core|annotated-types|typing-inspection|hjson|tyro|docstring-parser|docstring_parser|typeguard|webdataset|braceexpand|tokenizers|safetensors|rich|markdown-it-py|mdurl|pygments|py-cpuinfo|msgpack|einops|hypothesis|sortedcontainers|pytest|pytest-xdist|execnet|iniconfig|pluggy|packaging|numba|llvmlite|psutil|ninja|tensorboard|tensorboard-data-server|absl-py|grpcio|markdown|protobuf|werkzeug|scikit-learn|joblib|threadpoolctl|scipy|tqdm)==' >"$folder/requirements.txt"
.venv/bin/pip download --quiet --no-deps --only-binary=:all: --python-version "$version" --dest "$folder/wheels" --requirement "$folder/requirements.txt"
.venv/bin/pmlm prepare-corpus --source python-docs --output "$folder/corpus" --vocabulary-size 30522 --sequence-length 512 --shards 8
du -sh "$folder"
