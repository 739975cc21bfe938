#!/usr/bin/env python3
"""Whether clients that mean ill slow down the others: calls beside 1,000 requests that are never finished, and beside
1,000 readers that never read.

    cargo build --release && python3 benches/hostile.py

The daemon has its usual limits and a listener for probes. One caller asks, one call after the other and each on a
connection of its own, first alone, then beside the half-open connections, then beside the readers: `GET /v1/pools`, a
lease and its release, a chat completion of one token, and `/livez` of the probes' listener. Readers are streams of 100,000
tokens at full speed of which not a byte is read, so that every buffer between engine and client is full.

Loopback, temporary directories, everything stopped at the end. Standard library only.
"""

import argparse
import json
import resource
import socket
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from detection import wait_for  # noqa: E402
from gateway import body, cpu, resident, tree  # noqa: E402
from lifecycle import ROOT, Daemon, ask, free_port, processes, stop  # noqa: E402

HALVES = [b"", b"GET /livez HT", b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n{"]


POOLS = """
[[pool]]
id = "chat"
model = "stub:chat"
engine = "stub"
slots = 8
args = ["--slots", "8", "--tokens-per-second", "0"]
activation = "preload"
[[pool]]
id = "flood"
model = "stub:flood"
engine = "stub"
slots = 1024
context = 262144000
args = ["--slots", "1024", "--tokens-per-second", "0"]
activation = "preload"
"""


def connect(port, said):
    s = socket.socket()
    s.settimeout(30)
    # What is not read fills little, so that the far side feels it soon.
    s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    s.connect(("127.0.0.1", port))
    s.sendall(said)
    return s


def reader(port):
    text = body("flood", 100_000, True)
    return connect(port, (f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
                          f"content-length: {len(text)}\r\n\r\n{text}").encode())


def timed(call, times):
    took = []
    for _ in range(times):
        began = time.monotonic()
        call()
        took.append((time.monotonic() - began) * 1000)
    took.sort()
    return statistics.median(took), took[int(len(took) * 0.99)], took[-1]


def calls(daemon, probes):
    def good(port, method, path, text=None, want=(200,)):
        status, answer = ask(port, method, path, text, timeout=30.0)
        if status not in want:
            raise RuntimeError(f"{method} {path}: {status} {answer[:200]}")
        return answer

    def lease():
        told = json.loads(good(daemon.port, "POST", "/v1/pools/chat/leases", '{"ttl_ms":60000}', (201,)))
        good(daemon.port, "DELETE", f"/v1/leases/{told['lease_id']}", want=(204,))

    return {
        "GET /v1/pools": lambda: good(daemon.port, "GET", "/v1/pools"),
        "lease and release": lease,
        "chat, one token": lambda: good(daemon.port, "POST", "/v1/chat/completions", body("chat", 1, False)),
        "/livez of the probes": lambda: good(probes, "GET", "/livez"),
    }


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--binary", default=ROOT / "target/release/pool-managerd", type=Path)
    options.add_argument("--clients", type=int, default=1000)
    options.add_argument("--calls", type=int, default=1000)
    options = options.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    probes = free_port()
    daemon = Daemon(options.binary, POOLS, node=f'probe_listen = "127.0.0.1:{probes}"\n')
    try:
        for pool in ("chat", "flood"):
            wait_for(pool, lambda pool=pool: json.loads(ask(daemon.port, "GET", f"/v1/pools/{pool}")[1])["ready"])
        rows, state = {}, {}

        def measure(name):
            before, began = cpu(tree(daemon.process.pid)), time.monotonic()
            for what, call in calls(daemon, probes).items():
                rows.setdefault(what, {})[name] = timed(call, options.calls)
            used = 100 * (cpu(tree(daemon.process.pid)) - before) / (time.monotonic() - began)
            state[name] = (resident(tree(daemon.process.pid)), used)

        measure("alone")
        halves = [connect(daemon.port, HALVES[n % 3]) for n in range(options.clients)]
        measure("half-open")
        for s in halves:
            s.close()
        readers = [reader(daemon.port) for _ in range(options.clients)]
        # Until nothing moves any more: every buffer is full, and the engine waits.
        engine = json.loads(ask(daemon.port, "GET", "/v1/pools/flood")[1])["replicas"][0]["pid"]

        def still():
            before = cpu([engine])
            time.sleep(1)
            return cpu([engine]) - before < 0.02

        wait_for("full buffers", still, patience=300.0)
        leases = json.loads(ask(daemon.port, "GET", "/v1/pools/flood")[1])["active_leases"]
        measure("never read")
        for s in readers:
            s.close()
        columns = list(state)
        print(f"{options.clients} clients, {leases} of them readers whose streams were open; p50 / p99 / longest in ms of "
              f"{options.calls} calls:\n")
        print("| call | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
        for what, row in rows.items():
            print(f"| {what} | " + " | ".join("{:.2f} / {:.2f} / {:.2f}".format(*row[c]) for c in columns) + " |")
        print("| daemon: resident MiB, % of a core | " + " | ".join("{:.1f}, {:.0f}".format(*state[c]) for c in columns) + " |")
    finally:
        daemon.close()
        for process in list(processes):
            stop(process)


if __name__ == "__main__":
    main()
