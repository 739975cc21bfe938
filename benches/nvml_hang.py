#!/usr/bin/env python3
"""What the API costs while the driver hangs: NVML's calls block, requests must not.

    cargo build --release -p pool-managerd -p nvml-standin && python3 benches/nvml_hang.py --seconds 60

The daemon runs on the driver library's stand-in (two GPUs, a pool that serves on each). Requests of three kinds are sent one after
the other, alternating, at a fixed pace: GET /v1/pools, a lease and its release, GET /metrics. First while the driver
answers, then while every call about the first GPU blocks, then again while it answers, so that what the machine does
otherwise shows. Loopback, temporary directories, everything stopped at the end. Standard library only.
"""

import argparse
import http.client
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from lifecycle import POLL, ROOT, ask, free_port, free_range, poll_until_200, processes, start, stop  # noqa: E402

GPU = "GPU-51000000-0000-4000-8000-00000000000{}"
KINDS = ("GET /v1/pools", "lease and release", "GET /metrics")


def quantile(values, q):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


class Node:
    """The daemon with the stand-in for its driver library."""

    def __init__(self, release):
        self.dir = Path(tempfile.mkdtemp(prefix="nvml-hang-"))
        self.port, self.hung = free_port(), self.dir / "hung"
        library = self.dir / "lib"
        library.mkdir()
        built = next(p for p in (release, release / "deps") if (p / "libnvml_standin.so").is_file())
        os.symlink((built / "libnvml_standin.so").resolve(), library / "libnvidia-ml.so.1")
        self.script = library / "libnvidia-ml.so.1.toml"
        self.topology = (ROOT / "crates/nvml-standin/topologies/mixed-24-12.toml").read_text()
        self.play()
        claims = library / "claims"
        pools = "".join(
            f'[[pool]]\nid = "{name}"\nmodel = "stub:{name}"\nengine = "stub"\ndevices = "{index}"\nactivation = "preload"\n'
            f'vram = "2 GiB"\nargs = ["--vram", "1 GiB", "--vram-dir", "{claims}"]\n'
            for index, name in enumerate(("accused", "other"))
        )
        (self.dir / "c.toml").write_text(
            f'[node]\nlisten = "127.0.0.1:{self.port}"\nstate_dir = "state"\nengine_ports = "{free_range()}"\n'
            f'[gpu]\nbackend = "nvml"\nkernel_log = "off"\n{pools}'
        )
        self.log = open(self.dir / "daemon.log", "wb")
        environment = {**os.environ, "LD_LIBRARY_PATH": str(library), "XDG_RUNTIME_DIR": str(self.dir)}
        command = [release / "pool-managerd", "serve", "--config", self.dir / "c.toml"]
        self.process = start(command, stdout=self.log, stderr=self.log, env=environment)
        poll_until_200(self.port, "/readyz", self.process, POLL)
        for name in ("accused", "other"):
            self.wait(lambda name=name: self.pool(name).get("ready"), f"{name} ready")

    def play(self, block=""):
        new = self.script.with_suffix(".new")
        new.write_text(self.topology + block)
        os.replace(new, self.script)

    def wait(self, seen, what):
        end = time.monotonic() + 60
        while not seen():
            if time.monotonic() > end:
                raise RuntimeError(f"{what}: never came\n" + (self.dir / "daemon.log").read_text()[-2000:])
            time.sleep(0.05)

    def pool(self, name):
        status, body = ask(self.port, "GET", f"/v1/pools/{name}")
        return json.loads(body) if status == 200 else {}

    def health(self):
        return {d["uuid"]: d["health"] for d in json.loads(ask(self.port, "GET", "/v1/node")[1])["devices"]}

    def hang(self):
        self.hung.write_text("")
        self.play(f'\n[[block]]\ncall = "*"\ndevice = "{GPU.format("1")}"\nwhile_file = "{self.hung}"\n')
        self.wait(lambda: self.health().get(GPU.format("1")) == "unknown", "the device unknown")

    def answer(self):
        calls = len(self.hung.read_text().splitlines())
        self.hung.unlink()
        self.play()
        self.wait(lambda: set(self.health().values()) == {"ok"}, "the devices well")
        return calls

    def close(self):
        stop(self.process)
        self.log.close()
        shutil.rmtree(self.dir, ignore_errors=True)


def measure(node, seconds, pace):
    """Milliseconds of each request, by kind; one connection, as a client keeps."""
    took = {kind: [] for kind in KINDS}
    connection = http.client.HTTPConnection("127.0.0.1", node.port, timeout=30)

    def send(method, path, body=None, expected=(200,)):
        connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
        answer = connection.getresponse()
        text = answer.read()
        if answer.status not in expected:
            raise RuntimeError(f"{method} {path}: {answer.status} {text[:300]!r}")
        return text

    def lease():
        # Of the accused GPU's pool: it serves on.
        made = json.loads(send("POST", "/v1/pools/accused/leases", '{"ttl_ms":60000}', (201,)))
        send("DELETE", f"/v1/leases/{made['lease_id']}", expected=(200, 204))

    ways = (lambda: send("GET", "/v1/pools"), lease, lambda: send("GET", "/metrics"))
    end, due = time.monotonic() + seconds, time.monotonic()
    while time.monotonic() < end:
        for kind, way in zip(KINDS, ways):
            began = time.perf_counter()
            way()
            took[kind].append((time.perf_counter() - began) * 1000)
        due += pace
        time.sleep(max(0.0, due - time.monotonic()))
    connection.close()
    return took


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="for which the driver hangs")
    parser.add_argument("--around", type=float, default=30.0, help="seconds measured before, and after")
    parser.add_argument("--pace", type=float, default=0.005, help="seconds between two rounds of requests")
    parser.add_argument("--target", type=Path, default=ROOT / "target/release", help="where the daemon was built")
    args = parser.parse_args()
    node = Node(args.target)
    try:
        measure(node, 2, args.pace)  # what is slow the first time
        before = measure(node, args.around, args.pace)
        pids = [node.pool(name)["replicas"][0]["pid"] for name in ("accused", "other")]
        node.hang()
        hung = measure(node, args.seconds, args.pace)
        still = node.health()
        same = [node.pool(name)["replicas"][0]["pid"] for name in ("accused", "other")] == pids
        calls = node.answer()
        after = measure(node, args.around, args.pace)
    finally:
        node.close()
        for process in list(processes):
            stop(process)
    print(f"{args.seconds:.0f} s; while it hung: {calls} call on its way, devices {sorted(set(still.values()))}, "
          f"engines {'as they were' if same else 'others'}")
    print("| request | p50 before, ms | while it hangs | after | p99 before, ms | while it hangs | after | p99 ratio |")
    print("|---|---|---|---|---|---|---|---|")
    worst = 0.0
    for kind in KINDS:
        phases = [phase[kind] for phase in (before, hung, after)]
        p99 = [quantile(values, 0.99) for values in phases]
        ratio = p99[1] / statistics.mean((p99[0], p99[2]))
        worst = max(worst, ratio)
        cells = [f"{statistics.median(values):.3f}" for values in phases] + [f"{value:.3f}" for value in p99]
        print(f"| {kind} ({len(phases[1])}) | {' | '.join(cells)} | {ratio:.2f} |")
    return 0 if calls == 1 and same and worst < 2.0 else 1


if __name__ == "__main__":
    sys.exit(main())
