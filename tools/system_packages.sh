#!/bin/sh
# Installs system packages when one of the commands they bring is missing.
#
# usage: system_packages.sh "commands to look for" "packages to install"
#        system_packages.sh --always "packages to install"
# Where it may not install (no apt, no root), it prints the command to run and fails.
set -eu

if [ "$1" = "--always" ]; then
    packages=$2
else
    packages=""
    for command in $1; do
        command -v "$command" >/dev/null 2>&1 || packages=$2
    done
    # bcc is a Python module of the system's interpreter: no command on the PATH tells of it.
    case " $2 " in
        *" python3-bpfcc "*) [ -e /usr/lib/python3/dist-packages/bcc ] || packages=$2 ;;
    esac
fi
[ -n "$packages" ] || exit 0

available=""
ask="sudo apt-get install -y $packages"
command -v apt-get >/dev/null 2>&1 || {
    echo "These system packages are missing: $packages" >&2
    echo "Install them with this system's package manager, then run make again." >&2
    exit 1
}
if [ "$(id -u)" = 0 ]; then
    become=""
elif command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null; then
    become="sudo -n"
else
    echo "System packages are missing. Run this, then run make again:" >&2
    echo "  $ask" >&2
    exit 1
fi

echo "Installing system packages: $packages"
$become apt-get update -qq
# A package that this release does not have (kernel headers of another architecture, say) must
# not keep the others from being installed.
for package in $packages; do
    if apt-cache show "$package" >/dev/null 2>&1; then
        case "$package" in
            # NodeSource's nodejs brings its own npm and refuses Debian's.
            npm) command -v npm >/dev/null 2>&1 && continue ;;
            nodejs) command -v node >/dev/null 2>&1 && continue ;;
        esac
        available="$available $package"
    else
        echo "  not in this release, skipped: $package"
    fi
done
# shellcheck disable=SC2086
$become env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $available >/dev/null
