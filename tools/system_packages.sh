#!/bin/sh
# Installs the Debian/Ubuntu packages that tdkd-dist needs, or names them in one line if it may not.
# The headers are for building ffcv, which PyPI has as source only; Fashion-MNIST is quickstart's data.
set -eu
packages="g++ pkg-config python3-venv python3-dev libopencv-dev libturbojpeg0-dev dataset-fashion-mnist"
missing=""
for package in $packages; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q "ok installed" || missing="$missing $package"
done
[ -n "$missing" ] || exit 0
as_root=""
if [ "$(id -u)" != 0 ]; then
    if sudo -n true 2>/dev/null; then
        as_root="sudo"
    else
        echo "missing system packages:$missing" >&2
        echo "install them with: sudo apt-get install --no-install-recommends$missing" >&2
        echo "or, without root, from conda-forge: compilers pkg-config opencv libjpeg-turbo (and bring your own data)" >&2
        exit 2
    fi
fi
echo "installing with apt:$missing"
$as_root apt-get update -qq >/dev/null
DEBIAN_FRONTEND=noninteractive $as_root apt-get install -y -qq --no-install-recommends $missing >/dev/null
