#!/usr/bin/env bash
# Build the image without a Docker engine and train in it: buildah on a base made with debootstrap (as root, on Debian).
#
# The build uses pip's settings of this machine (mirrors in folders, certificates). They are mounted, so that they leave
# nothing in the image.
set -euo pipefail
cd "$(dirname "$0")/.."

PATH=$PATH:/usr/sbin:/sbin
missing=()
for tool in buildah debootstrap crun; do
    command -v "$tool" >/dev/null || missing+=("$tool")
done
if ((${#missing[@]})); then
    if ((EUID)) || ! command -v apt-get >/dev/null; then
        echo "Building the image needs ${missing[*]}, and only root on Debian or Ubuntu can install it from here" >&2
        exit 1
    fi
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends "${missing[@]}"
fi

folder=$(mktemp -d)
build() { buildah --root "$folder/storage" --runroot "$folder/run" --storage-driver vfs "$@"; }
cleanup() {
    build rm --all >/dev/null 2>&1 || true
    rm -rf "$folder"
}
trap cleanup EXIT

echo "== base"
debootstrap --variant=minbase bookworm "$folder/base" >"$folder/base.log" 2>&1 || { tail "$folder/base.log" >&2; exit 1; }
container=$(build from scratch)
build add --quiet "$container" "$folder/base" / >/dev/null
build commit --quiet --rm "$container" localhost/base >/dev/null
rm -rf "$folder/base"

echo "== image"
mounts=()
mkdir "$folder/pip"
python3 - "$folder/pip/pip.conf" >"$folder/mounts" <<'PYTHON'
"""Write pip's settings for the build; print the mount of every path in them."""
import os, re, subprocess, sys

listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
settings = dict(re.findall(r"^(?:global\.|:env:\.)([\w-]+)='(.*)'$", listed, flags=re.MULTILINE))
words = {word.removeprefix("file://") for value in settings.values() for word in value.split()}
words = {word.removesuffix("/simple") for word in words}  # an index: its pages refer to files beside them
text = "[global]\n" + "".join(f"{name} = {value}\n" for name, value in settings.items())
for number, place in enumerate(sorted(filter(os.path.exists, words), key=len, reverse=True)):
    if place.startswith("/"):
        text = text.replace(place, f"/run/pip/{number}")
        print(f"{place}:/run/pip/{number}:ro")
with open(sys.argv[1], "w") as file:
    file.write(text)
PYTHON
while read -r mount; do mounts+=(--volume "$mount"); done <"$folder/mounts"
mounts+=(--volume "$folder/pip/pip.conf:/etc/pip.conf:ro")
build bud --isolation chroot --build-arg BASE=localhost/base "${mounts[@]}" --file docker/Dockerfile \
    --tag localhost/pmlm . >"$folder/build.log" 2>&1 || { tail -n 60 "$folder/build.log" >&2; exit 1; }

echo "== training in the image, as its user"
mkdir "$folder/texts"
for document in docs/*.md; do cp "$document" "$folder/texts/$(basename "$document" .md).txt"; done
chmod -R a+rX "$folder/texts"
container=$(build from localhost/pmlm)
# shellcheck disable=SC2016 # expanded in the container
build run --isolation chroot --volume "$folder/texts:/texts:ro" "$container" -- bash -euc '
    [[ $(id -un) == pmlm ]]
    mpirun --oversubscribe -n 2 pmlm prepare-corpus --source "/texts/*.txt" --output corpus --vocabulary-size 1000 \
        --sequence-length 64 --shards 8 --validation-fraction 0.1
    deepspeed --num_gpus 2 train.py --preset tiny --corpus corpus --run-dir run --train.steps 5 --optim.warmup-steps 1
    pmlm checkpoint verify run/checkpoints'
echo "== the image trains"
