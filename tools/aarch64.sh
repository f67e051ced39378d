#!/usr/bin/env bash
# Builds the CPU kernels for aarch64 and holds them against golden values: `tools/aarch64.sh`.
#
# It needs g++-aarch64-linux-gnu and qemu-user, and neither Python nor torch. Arguments are another compiler and what runs
# its programs: `tools/aarch64.sh g++` does the same here, at the level that every CPU has.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ $# -eq 0 ]; then
    set -- aarch64-linux-gnu-g++ qemu-aarch64 -L /usr/aarch64-linux-gnu
fi
compiler=$1
shift
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The flags that decide about rounding are setup.py's; its -O3 would take three times as long to compile.
flags=(-std=c++17 -O1 -ffp-contract=off -fno-math-errno -Wall -Wno-maybe-uninitialized -DFASTSAMPLE_GENERIC)
sources=(csrc/cpu/{kernels_scalar,lora_scalar,amx,dispatch,lora_linear,memory,noise,step,threads}.cpp
    tests/support/kernels_alone/program.cpp)
printf '%s\n' "${sources[@]}" |
    xargs -P 2 -I SOURCE sh -c '"$@" -c SOURCE -o "$0/$(basename SOURCE).o"' "$work" "$compiler" "${flags[@]}"
"$compiler" "$work"/*.o -ldl -pthread -o "$work/program"
"$@" "$work/program" tests/golden/kernels.txt
