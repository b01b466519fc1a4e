#!/bin/sh
# Installs a wheel into a new environment, without torch, and uses it there: the command, and every transport.
set -eu
wheel=$(realpath "$1")
python=${2:-python3}
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
"$python" -m venv "$place/venv"
"$place/venv/bin/pip" install --quiet "$wheel[ucx,serve]"
cd "$place"
./venv/bin/pdkv version
for tls in tcp posix,self; do
  ./venv/bin/python -m pdkv.transport.conformance pdkv.transport.conformance:make_ucx --argument "$tls" \
    --check reads_every_byte --check reads_scattered_odd_spans --check fails_when_killed_during
done
for transport in shm sockets auto; do
  ./venv/bin/python -m pdkv.transport.conformance "pdkv.transport.conformance:make_$transport" \
    --check reads_every_byte --check reads_scattered_odd_spans --check fails_when_killed_during
done
if ./venv/bin/python -c 'import torch' 2>/dev/null; then
  echo "the wheel alone must not bring torch" >&2
  exit 1
fi
