#!/usr/bin/env bash
# Everything that only a GPU can show, in one command and under nine minutes: benchmarks/gpu.sh [OUT.json] [--dry]
#
# Needs an NVIDIA GPU, nvcc, CMake, and a Python ($PYTHON, or python3) with torch, transformers, numpy, pybind11 and
# pytest; no network, no install. Builds _core and _cuda for this GPU below build/gpu, then runs benchmarks/gpu.py,
# which writes OUT.json (default: benchmarks/gpu.json) part by part. Exit code 1 where any part failed: the file says
# which and why, and holds what the others gave. --dry builds nothing and runs the same Python on the CPU with tiny
# shapes, on the installed package: it shows that the script runs, and no figure of a GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
out=benchmarks/gpu.json
dry=
for argument in "$@"; do
    case $argument in
        --dry) dry=--dry ;;
        -*) echo "usage: benchmarks/gpu.sh [OUT.json] [--dry], got '$argument'" >&2; exit 2 ;;
        *) out=$argument ;;
    esac
done
if [ -n "$dry" ]; then
    exec "$python" benchmarks/gpu.py --out "$out" --dry
fi

began=$SECONDS
capability=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') ||
    { echo "gpu.sh: torch in $python must see a CUDA device" >&2; exit 1; }
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' python/stage1_pro/__init__.py)
build=build/gpu
generator=()
if command -v ninja >/dev/null; then generator=(-G Ninja); fi
cmake -S . -B $build "${generator[@]}" -DCMAKE_BUILD_TYPE=Release -DSTAGE1_CUDA=ON \
    -DCMAKE_CUDA_ARCHITECTURES="$capability-real" -DSKBUILD_PROJECT_VERSION="$version" \
    -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" -DPython_EXECUTABLE="$(command -v "$python")"
cmake --build $build --parallel
rm -rf $build/site
cmake --install $build --prefix $build/site
cp -r python/stage1_pro/. $build/site/stage1_pro/
echo "gpu.sh: built in $((SECONDS - began)) s"
PYTHONPATH=$PWD/$build/site exec "$python" benchmarks/gpu.py --out "$out" --build-seconds $((SECONDS - began))
