#!/usr/bin/env bash
# Installs a package in a clean Debian root, serves with it, upgrades, removes and purges it: OLD.deb NEW.deb.
# In namespaces of its own (mounts, processes, network with loopback alone): nothing is left when it ends. As root.
set -euo pipefail

SUITE=bookworm
old=$(realpath "$1") new=$(realpath "$2")
cache=$PWD/target/tools/root-$SUITE.tar
work=$PWD/target/package-test
root=$work/root

say() { printf '\n--- %s\n' "$*"; }
fail() { printf 'FAILED: %s\n' "$*" >&2; exit 1; }

if [ "${3:-}" != inside ]; then
    [ "$(id -u)" = 0 ] || fail "it makes a root: run it as root"
    if [ ! -f "$cache" ]; then
        command -v debootstrap >/dev/null || fail "debootstrap is missing: apt-get install debootstrap"
        say "making a clean root (once)"
        made=$(mktemp -d)
        debootstrap --variant=minbase "$SUITE" "$made" >/dev/null
        rm -rf "$made"/var/cache/apt/archives/*.deb
        tar --create --one-file-system --directory "$made" --file "$cache.new" .
        mv "$cache.new" "$cache"
        rm -rf --one-file-system "$made"
    fi
    rm -rf --one-file-system "$work"
    mkdir -p "$root"
    tar --extract --directory "$root" --file "$cache"
    trap 'rm -rf --one-file-system "$work"' EXIT
    unshare --mount --pid --net --ipc --uts --fork --kill-child --propagation private bash "$0" "$old" "$new" inside
    exit
fi

ip link set lo up
mount --bind "$root" "$root"
mount -t proc proc /proc
mount -t proc proc "$root/proc"
mount -t tmpfs -o mode=755 run "$root/run"
mount -t tmpfs -o mode=755 dev "$root/dev"
for device in null zero full random urandom; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
mkdir -m 1777 "$root/dev/shm"
mkdir "$root/packages"
cp "$old" "$root/packages/old.deb"
cp "$new" "$root/packages/new.deb"

in_root() { chroot "$root" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C DEBIAN_FRONTEND=noninteractive "$@"; }
# Everything there is but what dpkg and its kind write about themselves, and processes.
files() {
    (cd "$root" && find . -xdev \( -path ./proc -o -path ./dev -o -path ./var/lib/dpkg -o -path ./var/log \
        -o -path ./packages -o -path ./var/cache/debconf -o -path ./var/lib/systemd/deb-systemd-helper-enabled \) -prune -o -print \
        | grep -vE '^\./(etc/(passwd|group|shadow|gshadow|subuid|subgid)-?|var/cache/ldconfig/.*)$' | sort)
    (cd "$root" && cat etc/passwd etc/group)
    # adduser keeps its lock there.
    ls "$root/run" | grep -vx adduser || true
}
# The directories and the process of the unit, as systemd makes them: it is read from the installed unit.
unit=$root/usr/lib/systemd/system/pool-managerd.service
setting() { sed -n "s/^$1=//p" "$unit"; }
daemon=
start() {
    local user who
    user=$(setting User)
    who=$(in_root id -u "$user"):$(in_root id -g "$user")
    install -d -o "${who%:*}" -g "${who#*:}" -m 0755 "$root/run/$(setting RuntimeDirectory)"
    install -d -o "${who%:*}" -g "${who#*:}" -m "$(setting StateDirectoryMode)" "$root/var/lib/$(setting StateDirectory)"
    install -d -o "${who%:*}" -g "${who#*:}" -m 0755 "$root/var/cache/$(setting CacheDirectory)"
    # shellcheck disable=SC2046 # words are meant
    chroot --userspec="$who" --groups="${who#*:}" "$root" setpriv --no-new-privs env -i \
        HOME=/var/lib/pool-managerd PATH=/usr/bin:/bin $(setting Environment) \
        sh -c "umask $(setting UMask); exec $(setting ExecStart)" >>"$work/daemon.log" 2>&1 &
    daemon=$!
}
stop() {
    kill -TERM "$daemon"
    wait "$daemon" || fail "the daemon did not end well: $(tail -5 "$work/daemon.log")"
}
managerd() { in_root pool-managerd "$@" --server unix:/run/pool-managerd/api.sock; }
answer() {
    curl --silent --output /dev/null --write-out '%{http_code}' --unix-socket "$root/run/pool-managerd/api.sock" \
        "http://localhost$1" || true
}
alive() { kill -0 "$daemon" 2>/dev/null || fail "the daemon is gone: $(tail -5 "$work/daemon.log")"; }
serving() { until [ "$(answer /readyz)" = 200 ]; do alive; sleep 0.1; done; }
# pid and generation of the pool's engine
engine() {
    managerd status chat --json | python3 -c 'import json, sys
pool = json.load(sys.stdin)
pool = pool[0] if isinstance(pool, list) else pool
replica = pool["replicas"][0]
print(replica["pid"], replica["generation"], replica["state"])'
}
files >"$work/before"

say "installed"
in_root dpkg -i /packages/old.deb
in_root pool-managerd --version
in_root id pool-managerd
[ "$(in_root stat -c %U:%a /var/lib/pool-managerd)" = pool-managerd:700 ] || fail "the state is not the service's alone"
[ "$(in_root stat -c %U:%G:%a /etc/pool-managerd)" = root:pool-managerd:750 ] || fail "tokens would be for everybody to see"
in_root test -s /usr/share/bash-completion/completions/pool-managerd || fail "no completions"
in_root test -s /usr/share/man/man1/pool-managerd-serve.1.gz || in_root grep -q man /etc/dpkg/dpkg.cfg.d/* || fail "no man page"
in_root test -s /usr/share/doc/pool-managerd/copyright || fail "no copyright"
in_root sh -c 'zcat /usr/share/doc/pool-managerd/LICENCES.txt.gz' | grep -c '^tokio ' >/dev/null || fail "no report of licences"
start
# Without a GPU it waits for one, alive and not ready.
until [ "$(answer /livez)" = 200 ]; do alive; sleep 0.1; done
[ "$(answer /readyz)" = 503 ] || fail "ready without a GPU"
say "with the config as it is shipped it is alive, and waits for a GPU"
stop

say "a pool of a stub engine on simulated devices"
cat >>"$root/etc/pool-managerd/pool-managerd.toml" <<'POOL'

[[pool]]
id = "chat"
model = "stub:chat"
engine = "stub"
args = ["--tokens-per-second", "20"]
activation = "preload"
POOL
sed -i 's|^wait = "forever"|backend = "simulated"\ntopology = "devices.toml"|' "$root/etc/pool-managerd/pool-managerd.toml"
cp crates/gpu-sim/two-gpus.toml "$root/etc/pool-managerd/devices.toml"
start
serving
managerd preload chat
read -r pid generation state < <(engine)
[ "$state" = ready ] || fail "the engine is $state"
echo "engine: pid $pid, generation $generation, uid $(stat -c %u "/proc/$pid")"
[ "$(stat -c %u "/proc/$pid")" = "$(in_root id -u pool-managerd)" ] || fail "it does not run under its own user"

say "upgraded while it streams"
endpoint=$(curl --silent --fail --unix-socket "$root/run/pool-managerd/api.sock" -X POST http://localhost/v1/pools/chat/leases \
    -H 'Content-Type: application/json' -d '{"ttl_ms":60000}' | python3 -c 'import json, sys; print(json.load(sys.stdin)["endpoint"]["url"])')
curl --silent --no-buffer "$endpoint/v1/chat/completions" -H 'Content-Type: application/json' \
    -d '{"model":"chat","messages":[{"role":"user","content":"go on"}],"max_tokens":200,"stream":true}' >"$work/stream" &
stream=$!
until [ -s "$work/stream" ]; do sleep 0.05; done
in_root dpkg -i /packages/new.deb
# systemd would restart it now.
stop
kill -0 "$stream" 2>/dev/null || fail "the stream was over before the upgrade: nothing is shown by it"
start
serving
read -r pid_after generation_after state < <(engine)
echo "engine: pid $pid_after, generation $generation_after, $state"
[ "$pid $generation" = "$pid_after $generation_after" ] || fail "the engine is another one"
wait "$stream" || fail "the stream was cut off"
grep -q '^data: \[DONE\]' "$work/stream" || fail "the stream was cut off"
[ "$(grep -c '^data: {' "$work/stream")" -ge 200 ] || fail "the stream lost tokens"
grep -q '^id = "chat"' "$root/etc/pool-managerd/pool-managerd.toml" || fail "the upgrade changed the config"
read -r pid_after _ state < <(engine)
[ "$state $pid_after" = "ready $pid" ] || fail "the engine is $state"

say "removed while an engine that was to be kept serves"
stop
kill -0 "$pid" || fail "the engine was not kept"
in_root dpkg -r pool-managerd
if kill -0 "$pid" 2>/dev/null; then fail "the engine outlived the package"; fi
[ -d "$root/var/lib/pool-managerd" ] && [ -f "$root/etc/pool-managerd/pool-managerd.toml" ] || fail "remove is no purge"

say "purged"
in_root dpkg -P pool-managerd
rm -f "$root/packages"/*
files >"$work/after"
diff "$work/before" "$work/after" || fail "something is left"
if in_root id pool-managerd 2>/dev/null; then fail "the user is left"; fi

say "ok: installed, upgraded with its engine and a stream going on, removed, purged"
