#!/usr/bin/env bash
# Installs the Debian packages that the local cluster is made with, those whose
# programs are missing only: Docker's own containerd and runc are kept.
set -euo pipefail
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

have() { command -v "$1" >/dev/null 2>&1; }

missing=()
{ have containerd && have ctr && have containerd-shim-runc-v2; } || missing+=(containerd)
have runc || missing+=(runc)
have iptables || missing+=(iptables)
have conntrack || missing+=(conntrack)
have ip || missing+=(iproute2)
{ have nsenter && have unshare && have setsid; } || missing+=(util-linux)
have mount || missing+=(mount)
plugins=
for folder in /usr/lib/cni /opt/cni/bin /usr/libexec/cni; do
    [ -e "$folder/ptp" ] && [ -e "$folder/host-local" ] && plugins=$folder
done
[ -n "$plugins" ] || missing+=(containernetworking-plugins)

[ ${#missing[@]} -gt 0 ] || exit 0
have apt-get || {
    echo "install the equivalents of these Debian packages: ${missing[*]}" >&2
    exit 1
}
[ "$(id -u)" -eq 0 ] || {
    echo "run as root: apt-get install ${missing[*]}" >&2
    exit 1
}
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
