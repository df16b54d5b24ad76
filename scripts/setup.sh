#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# Makes a fresh Debian 12 ready for vhostfs: Debian packages (as root, or with
# sudo), then .venv with the project in it. Does again only what has changed.
#
# Usage: scripts/setup.sh [EXTRA]   EXTRA: optional dependencies, e.g. "test"
set -euo pipefail

extra=${1:-}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv

packages=(
	gcc libc6-dev python3-dev python3-venv       # to build the native core and the guest's agent
	libseccomp-dev libcap-ng-dev                 # to build the sandbox
	debian-archive-keyring dpkg gpgv             # to fetch the guest's packages, verified
	qemu-system-x86                              # to run guests
)
test_packages=(
	cpio                                         # to check the archive writer against another reader
	make                                         # to build the C core's own tests
	xfsprogs                                     # to make a file system with reflinks
	uidmap                                       # to test the sandbox without root
)

[[ $extra == test ]] && packages+=("${test_packages[@]}")

say() { printf 'setup: %s\n' "$*" >&2; }

quietly() {
	local log
	log=$(mktemp)
	if ! "$@" >"$log" 2>&1; then
		tail -n 30 "$log" >&2
		rm -f "$log"
		say "failed: $*"
		exit 1
	fi
	rm -f "$log"
}

install_packages() {
	local missing=() package
	for package in "${packages[@]}"; do
		[[ $(dpkg-query -W -f '${Status}' "$package" 2>/dev/null) == "install ok installed" ]] ||
			missing+=("$package")
	done
	((${#missing[@]})) || return 0
	local as_root=()
	if ((EUID)); then
		command -v sudo >/dev/null || {
			say "root is needed to install: ${missing[*]}; run this as root or install sudo"
			exit 1
		}
		as_root=(sudo)
	fi
	say "installing Debian packages: ${missing[*]}"
	quietly "${as_root[@]}" apt-get -q update
	quietly "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
		apt-get -q -y --no-install-recommends install "${missing[@]}"
}

# What an installation with the extra $1 depends on: when it is as it was, pip has nothing to do.
fingerprint() {
	(
		cd "$root"
		"$venv/bin/python" --version
		echo "$root $1"
		cat pyproject.toml setup.py
		find native -type f \( -name '*.[ch]' -o -name '*.py' \) -print0 | sort -z | xargs -0 sha256sum
	) | sha256sum
}

# An installation for tests serves without tests too.
is_current() {
	local state=$venv/.vhostfs-installed
	[[ -x $venv/bin/vhostfs && -f $state ]] || return 1
	[[ $(<"$state") == "$(fingerprint "$extra")" || $(<"$state") == "$(fingerprint test)" ]]
}

install_project() {
	if [[ ! -x $venv/bin/python ]] || ! "$venv/bin/python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
		say "creating $venv"
		rm -rf "$venv"
		quietly python3 -m venv "$venv"
	fi
	if is_current; then return 0; fi
	say "building and installing vhostfs into $venv"
	quietly "$venv/bin/python" -m pip install -q --disable-pip-version-check -e "$root${extra:+[$extra]}"
	# A server starts in three quarters of the time; pip does this for what it copies, and this it does not copy.
	quietly "$venv/bin/python" -m compileall -q "$root/vhostfs"
	fingerprint "$extra" >"$venv/.vhostfs-installed"
}

if [[ $(dpkg --print-architecture 2>/dev/null) != amd64 ]]; then
	say "Debian on amd64 is expected here (dpkg says: $(dpkg --print-architecture 2>/dev/null || echo nothing))"
	exit 1
fi
install_packages
# Two at once would build over each other.
exec 9<"$root"
flock 9
install_project
