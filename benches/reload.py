#!/usr/bin/env python3
"""Measures reloads: streams through many of them, and for how long nobody serves where the engine is replaced in place.

    cargo build --release && cargo xtask engine && python3 benches/reload.py

Streams: clients lease, stream and release without pause while the pool is reloaded with `overlap` to another model and
back. Downtime: from the last picture of the pool that was ready to the first that is again, as a long poll tells it,
beside a stop and a preload of the same pool alone, alternating in one run. Standard library only.
"""

import argparse
import json
import os
import signal
import socket
import statistics
import sys
import threading
import time
from pathlib import Path

from lifecycle import ROOT, TIMEOUT, Daemon, ask, processes, span, stop

WAIT_MS = int(TIMEOUT * 1000)


def stream(url, tokens, begun):
    """Streams to the end and returns the last event; raises if that never comes."""
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({"prompt": "go on", "n_predict": tokens, "stream": True})
    with socket.create_connection((host, int(port)), TIMEOUT) as s:
        s.sendall(
            f"POST /completion HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        seen, last = 0, {}
        for line in s.makefile("r", encoding="utf-8"):
            if not line.startswith("data: "):
                continue
            last = json.loads(line[6:])
            seen += not last["stop"]
            if seen == 1:
                begun()
        if not last.get("stop") or seen != tokens:
            raise RuntimeError(f"cut off after {seen} of {tokens} tokens")
        return last


class Clients:
    """Lease, stream, release, until told to end."""

    def __init__(self, port, count, tokens):
        self.port, self.tokens = port, tokens
        self.lock, self.over = threading.Lock(), False
        self.flips = self.begun = self.whole = self.spanned = 0
        self.broken, self.refused, self.waits = [], [], []
        self.threads = [threading.Thread(target=self.run, daemon=True) for _ in range(count)]
        for thread in self.threads:
            thread.start()

    def started(self):
        with self.lock:
            self.begun += 1

    def run(self):
        while not self.over:
            began = time.monotonic()
            status, body = ask(self.port, "POST", "/v1/pools/chat/leases", json.dumps({"wait_ms": WAIT_MS}))
            self.waits.append((time.monotonic() - began) * 1000)
            if status != 201:
                self.refused.append(f"{status} {body.decode()[:200]}")
                continue
            lease, before = json.loads(body), self.flips
            try:
                stream(lease["endpoint"]["url"], self.tokens, self.started)
                with self.lock:
                    self.whole += 1
                    self.spanned += self.flips > before
            except (OSError, RuntimeError, ValueError) as e:
                self.broken.append(str(e))
            ask(self.port, "DELETE", f"/v1/leases/{lease['lease_id']}")

    def under_way(self):
        """Returns once as many streams have begun anew as there are clients."""
        goal = self.begun + len(self.threads)
        while self.begun < goal and not self.broken:
            time.sleep(0.002)

    def end(self):
        self.over = True
        for thread in self.threads:
            thread.join()


def pool(port):
    return json.loads(ask(port, "GET", "/v1/pools/chat")[1])


def streams(binary, reloads, clients, tokens):
    daemon = Daemon(
        binary,
        '[[pool]]\nid = "chat"\nmodel = "stub:one"\nengine = "stub"\nslots = 4\nactivation = "on_demand"\n'
        'args = ["--slots", "4", "--load-ms", "20"]\n',
    )
    try:
        daemon.verb("chat", "preload")
        crowd, to_flip = Clients(daemon.port, clients, tokens), []
        for n in range(reloads):
            crowd.under_way()
            model = ["stub:two", "stub:one"][n % 2]
            began = time.monotonic()
            body = json.dumps({"new_model_ref": model, "strategy": "overlap"})
            status, answer = ask(daemon.port, "POST", "/v1/pools/chat/reload", body)
            seen = pool(daemon.port)
            while seen["model"] != model:
                path = f"/v1/pools/chat?wait_for_snapshot={seen['snapshot']}&wait_ms=1000"
                seen = json.loads(ask(daemon.port, "GET", path)[1])
            to_flip.append((time.monotonic() - began) * 1000)
            crowd.flips += 1
            over = f"/v1/operations/{json.loads(answer)['operation_id']}?wait_ms={WAIT_MS}"
            outcome = json.loads(ask(daemon.port, "GET", over)[1])
            if status != 202 or outcome["state"] != "succeeded":
                raise RuntimeError(f"reload {n}: {status} {outcome}")
        crowd.end()
        for what in crowd.broken[:5] + crowd.refused[:5]:
            print(what, file=sys.stderr)
        return {
            "reloads": reloads,
            "clients": clients,
            "to_flip_ms": to_flip,
            "waits_ms": crowd.waits,
            "whole": crowd.whole,
            "spanned": crowd.spanned,
            "broken": len(crowd.broken),
            "refused": len(crowd.refused),
        }
    finally:
        daemon.close()


class Watch:
    """When the pool stopped being ready and was again, as a long poll tells it."""

    def __init__(self, port):
        self.port, self.over, self.changes = port, False, []
        self.first = threading.Event()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()
        self.first.wait(TIMEOUT)

    def run(self):
        seen = pool(self.port)
        ready = seen["ready"]
        self.first.set()
        while not self.over:
            path = f"/v1/pools/chat?wait_for_snapshot={seen['snapshot']}&wait_ms=1000"
            seen = json.loads(ask(self.port, "GET", path)[1])
            if seen["ready"] != ready:
                ready = seen["ready"]
                self.changes.append((ready, time.monotonic()))

    def downtime(self):
        """Milliseconds from the last ready before to the first ready after."""
        self.over = True
        self.thread.join()
        (gone, left), (back, came) = self.changes
        if gone or not back:
            raise RuntimeError(f"not one gap: {self.changes}")
        return (came - left) * 1000


def downtimes(binary, table, engine, roots, rounds, change):
    """`change(n)` is the body of the n-th reload."""
    daemon, out = Daemon(binary, table, engine, roots), {"downtime_ms": [], "stop_ms": [], "start_ms": []}
    try:
        # Not counted: the first start asks the engine for its version and flags.
        daemon.verb("chat", "preload")
        for n in range(rounds):
            began = time.monotonic()
            out["stop_ms"].append((daemon.verb("chat", "stop") - began) * 1000)
            began = time.monotonic()
            out["start_ms"].append((daemon.verb("chat", "preload") - began) * 1000)
            watch = Watch(daemon.port)
            daemon.verb("chat", "reload", json.dumps(change(n) | {"strategy": "in_place"}))
            out["downtime_ms"].append(watch.downtime())
    finally:
        daemon.close()
    alone = [a + b for a, b in zip(out["stop_ms"], out["start_ms"])]
    out["more_ms"] = statistics.median(d - a for d, a in zip(out["downtime_ms"], alone))
    out["ratio"] = statistics.median(d / a for d, a in zip(out["downtime_ms"], alone))
    return out


def in_place(binary, engine, models, rounds, load_ms=300):
    stub = (
        '[[pool]]\nid = "chat"\nmodel = "stub:one"\nengine = "stub"\nactivation = "on_demand"\n'
        f'args = ["--load-ms", "{load_ms}"]\n'
    )
    models_of = lambda n: {"new_model_ref": ["stub:two", "stub:one"][n % 2]}
    yield f"stub, loads {load_ms} ms", downtimes(binary, stub, "", "/nonexistent", rounds, models_of)
    if not engine.exists():
        return
    declared = f'[engines.real]\nkind = "llama.cpp"\nmode = "binary"\npath = "{engine}"\n'
    for name, path in models.items():
        if path.exists():
            table = (
                f'[[pool]]\nid = "chat"\nmodel = "file:{path}"\nengine = "real"\ncontext = 512\nslots = 1\n'
                'activation = "on_demand"\n'
            )
            contexts = lambda n: {"context": [768, 512][n % 2]}
            yield f"llama-server, {name}", downtimes(binary, table, declared, path.parent, rounds, contexts)


def rows(result):
    """What, figure, goal, whether it is met (None: no goal)."""
    if s := result.get("streams"):
        what = f"{s['reloads']} `overlap` reloads, {s['clients']} clients"
        yield f"{what}: streams, of them across a flip", f"{s['whole']}, {s['spanned']}", "", None
        yield f"{what}: broken streams", str(s["broken"]), "0", s["broken"] == 0
        yield f"{what}: leases refused", str(s["refused"]), "0", s["refused"] == 0
        yield f"{what}: lease call, ms", span(s["waits_ms"]), "", None
        yield f"{what}: request → flip, ms", span(s["to_flip_ms"]), "", None
    for name, d in result.get("in_place", {}).items():
        yield f"{name}: nobody serves, ms", span(d["downtime_ms"]), "", None
        yield f"{name}: stop alone, ms", span(d["stop_ms"]), "", None
        yield f"{name}: preload alone, ms", span(d["start_ms"]), "", None
        met = d["more_ms"] <= 20 or d["ratio"] <= 1.05
        yield f"{name}: more than stop and preload alone, ms", f"{d['more_ms']:.1f}", "≤ 20 or 5 %", met
        yield f"{name}: ratio", f"{d['ratio']:.3f}", "", None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print everything measured as JSON")
    parser.add_argument("--binary", type=Path, default=ROOT / "target/release/pool-managerd")
    parser.add_argument("--reloads", type=int, default=200, help="overlap reloads under streams (default 200)")
    parser.add_argument("--clients", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=60, help="of each stream, at 200 a second (default 60)")
    parser.add_argument("--rounds", type=int, default=20, help="in-place reloads of each engine (default 20)")
    parser.add_argument("--only", choices=["streams", "in_place"], help="measure only this")
    options = parser.parse_args()
    # So that an end by signal stops what was started, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    source = ROOT / "target/engine/source/bin/llama-server"
    engine = source if source.exists() else ROOT / "target/engine/bin/llama-server"
    models = {
        "SmolLM2-135M": ROOT / "target/engine/models/smollm2-135m.gguf",
        "tiny": ROOT / "target/engine/models/tiny.gguf",
    }
    binary = options.binary.absolute()
    if not binary.exists():
        sys.exit(f"missing: {binary}; run `cargo build --release`")
    result = {"cpus": os.cpu_count(), "load": os.getloadavg()[0]}
    try:
        if options.only in (None, "streams"):
            result["streams"] = streams(binary, options.reloads, options.clients, options.tokens)
        if options.only in (None, "in_place"):
            result["in_place"] = dict(in_place(binary, engine, models, options.rounds))
    finally:
        for process in list(processes):
            stop(process)
    result["load_after"] = os.getloadavg()[0]
    table = list(rows(result))
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        print(f"{result['cpus']} CPUs; load {result['load']:.1f} → {result['load_after']:.1f}.")
        print("Median (least to most).\n")
        print("| what | figure | goal | met |\n|---|---|---|---|")
        for what, figure, goal, met in table:
            print(f"| {what} | {figure} | {goal} | {'' if met is None else 'yes' if met else 'NO'} |")
    return 0 if all(met is not False for *_, met in table) else 1


if __name__ == "__main__":
    sys.exit(main())
