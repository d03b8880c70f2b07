#!/usr/bin/env bash
# Install what the tests need and run them all; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

python -m pip install --quiet --disable-pip-version-check \
    -r requirements.txt -r tests/requirements.txt

find_chromium() {
    for name in chromium chromium-browser google-chrome google-chrome-stable; do
        if command -v "$name"; then
            return
        fi
    done
    local mac="/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
    if [ -x "$mac" ]; then
        echo "$mac"
    fi
}

if [ -z "$(find_chromium)" ] && command -v apt-get >/dev/null; then
    sudo=""
    if [ "$(id -u)" -ne 0 ]; then
        sudo=sudo
    fi
    $sudo apt-get update -qq
    $sudo apt-get install -y -qq chromium >/dev/null
fi
LAYERSHAP_CHROMIUM=$(find_chromium)
if [ -z "$LAYERSHAP_CHROMIUM" ]; then
    echo "No Chromium found: install chromium or Google Chrome for the browser tests." >&2
    exit 1
fi
export LAYERSHAP_CHROMIUM

# Two at a time, a file's tests together, each with one thread: most of them are small models.
export OMP_NUM_THREADS=1
python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder "$@"
