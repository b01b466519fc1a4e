#!/usr/bin/env bash
# bench_tools.sh PYTHON FOLDER: an environment with the movers that `pdkv bench xfer --vs` races against.
set -euo pipefail

python=$1 folder=$2
test -x "$folder/bin/python" || "$python" -m venv "$folder"
# NIXL's build for the driver's CUDA; without a GPU either will do.
nixl=nixl-cu12
if nvidia-smi 2>/dev/null | grep -Eq 'CUDA Version: 1[3-9]'; then nixl=nixl-cu13; fi
# Without their dependencies: torch is one, and neither needs it here.
"$folder/bin/python" -m pip install --quiet ${PIP_FLAGS:-} 'numpy>=2' 'msgspec>=0.19'
"$folder/bin/python" -m pip install --quiet ${PIP_FLAGS:-} --no-deps \
	"$nixl==1.5.1" mooncake-transfer-engine-non-cuda==0.3.13.post1

# Mooncake loads the verbs library also when it goes by TCP. Where there is none, Debian's goes into the folder.
if ! ldconfig -p | grep -q libibverbs.so.1; then
	mkdir -p "$folder/debian"
	cd "$folder/debian"
	apt-get download libibverbs1 libnl-3-200 libnl-route-3-200 ||
		{ echo "bench_tools: install libibverbs1 yourself, Mooncake does not load without it" >&2; exit 0; }
	for package in ./*.deb; do dpkg -x "$package" .; done
	rm ./*.deb
fi
