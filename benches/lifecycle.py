#!/usr/bin/env python3
"""Measures the built daemon against its promises: starts, memory, cold start, limits of time.

    cargo build --release && cargo xtask engine && python3 benches/lifecycle.py

Starts are measured side by side in one run, alternating: `preload` over HTTP until the answer that the pool is Ready,
and the same program with the same arguments and environment (read from what the daemon launched) started by this
script and polled every 10 ms until /completion gave its first token. Everything is on simulated
GPUs, free ports and temporary directories, and is stopped at the end. Standard library only.
"""

import argparse
import http.client
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
POLL = 0.010
TIMEOUT = 120.0
MIB = 1024.0
UNIT = json.dumps({"prompt": "Hi", "n_predict": 1, "cache_prompt": False})
TOPOLOGY = "".join(
    f'[[device]]\nname = "Simulated GPU"\nuuid = "GPU-51000000-0000-4000-8000-00000000000{n}"\nvram = "24 GiB"\n'
    for n in (1, 2)
)

processes = []  # what this script started and has not seen end


def start(args, **how):
    process = subprocess.Popen([str(a) for a in args], stdin=subprocess.DEVNULL, **how)
    processes.append(process)
    return process


def stop(process, patience=30.0):
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    if process in processes:
        processes.remove(process)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def free_range(length=64):
    """A range below the ephemeral ports in which nobody listens now."""
    while True:
        first = random.randrange(12000, 30000)
        try:
            for port in range(first, first + length):
                with socket.socket() as s:
                    s.bind(("127.0.0.1", port))
            return f"{first}-{first + length - 1}"
        except OSError:
            continue


def ask(port, method, path, body=None, timeout=TIMEOUT):
    """Status and body; a connection per request, as the daemon's probe has."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def poll_until_200(port, path, process, pause):
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        try:
            if ask(port, "GET", path, timeout=1.0)[0] == 200:
                return
        except OSError:
            pass
        except http.client.HTTPException:
            pass
        if process.poll() is not None:
            raise RuntimeError(f"the process ended with {process.returncode}")
        time.sleep(pause)
    raise RuntimeError(f"{path} was never answered with 200")


class Daemon:
    """The daemon in a directory of its own."""

    def __init__(self, binary, pools, engine="", roots="/nonexistent", node=""):
        self.dir = Path(tempfile.mkdtemp(prefix="pool-managerd-bench-"))
        self.port = free_port()
        (self.dir / "gpus.toml").write_text(TOPOLOGY)
        config = (
            f'[node]\nlisten = "127.0.0.1:{self.port}"\nstate_dir = "state"\nengine_ports = "{free_range()}"\n{node}'
            f'[gpu]\nbackend = "simulated"\ntopology = "gpus.toml"\n'
            f'[models]\nroots = ["{roots}"]\n{engine}{pools}'
        )
        (self.dir / "c.toml").write_text(config)
        self.log = open(self.dir / "daemon.log", "wb")
        began = time.monotonic()
        self.process = start([binary, "serve", "--config", self.dir / "c.toml"], stdout=self.log, stderr=self.log)
        try:
            poll_until_200(self.port, "/livez", self.process, 0.0005)
            self.cold_start_ms = (time.monotonic() - began) * 1000
            poll_until_200(self.port, "/readyz", self.process, POLL)
        except BaseException:
            print((self.dir / "daemon.log").read_text()[-2000:], file=sys.stderr)
            self.close()
            raise

    def verb(self, pool, verb, body=None):
        status, body = ask(self.port, "POST", f"/v1/pools/{pool}/{verb}?wait_ms={int(TIMEOUT * 1000)}", body)
        ended = time.monotonic()
        operation = json.loads(body)
        if status != 200 or operation.get("state") != "succeeded":
            raise RuntimeError(f"{verb} {pool}: {status} {body.decode()[:500]}")
        return ended

    def stop(self, pool):
        self.verb(pool, "stop")
        state = json.loads(ask(self.port, "GET", f"/v1/pools/{pool}")[1])["state"]
        if state != "idle":
            raise RuntimeError(f"{pool} is {state} after its stop succeeded")

    def preload(self, pool):
        """Seconds from the request, and from the launch, until Ready."""
        began = time.monotonic()
        ended = self.verb(pool, "preload")
        wall_ended = time.time() - (time.monotonic() - ended)
        view = json.loads(ask(self.port, "GET", f"/v1/pools/{pool}")[1])
        if not view["ready"]:
            raise RuntimeError(f"{pool} is not ready after its preload")
        # The daemon opens the shim's log just before it spawns the shim, which writes there only when it fails.
        return ended - began, wall_ended - self.newest(pool, "shim.log").stat().st_mtime

    def newest(self, pool, name):
        return max(self.dir.glob(f"state/run/{pool}-r0/*/{name}"), key=lambda p: p.stat().st_mtime)

    def launched(self, pool):
        """Arguments, environment and working directory of the running engine."""
        proc = Path("/proc") / str(json.loads(self.newest(pool, "start.json").read_text())["pid"])
        args = (proc / "cmdline").read_text().split("\0")[:-1]
        env = dict(pair.split("=", 1) for pair in (proc / "environ").read_text().split("\0") if pair)
        # An interpreter may come before the arguments; the daemon's first one is the model.
        return {"args": args[args.index("--model") :], "env": env, "workdir": os.readlink(proc / "cwd")}

    def close(self):
        stop(self.process)
        self.log.close()
        shutil.rmtree(self.dir, ignore_errors=True)


def bare(engine, launched):
    """Seconds from spawn to the first token of the same program with the same arguments, on another port."""
    args, port = list(launched["args"]), free_port()
    workdir = launched["workdir"] if os.path.isdir(launched["workdir"]) else "/"
    args[args.index("--port") + 1] = str(port)
    with tempfile.TemporaryFile() as log:
        began = time.monotonic()
        process = start(
            [engine, *args], env=launched["env"], stdout=log, stderr=log, cwd=workdir
        )
        try:
            poll_until_200(port, "/health", process, POLL)
            status, body = ask(port, "POST", "/completion", UNIT)
            took = time.monotonic() - began
            if status != 200 or json.loads(body)["tokens_predicted"] < 1:
                raise RuntimeError(f"the bare engine made no token: {status}")
            return took
        finally:
            stop(process)


def starts(binary, engine, models, rounds):
    pools = "".join(
        f'[[pool]]\nid = "{name}"\nmodel = "file:{path}"\nengine = "real"\ncontext = 512\nslots = 1\n'
        f'activation = "on_demand"\n'
        for name, path in models.items()
    )
    declared = f'[engines.real]\nkind = "llama.cpp"\nmode = "binary"\npath = "{engine}"\n'
    daemon = Daemon(binary, pools, declared, next(iter(models.values())).parent)
    out = {}
    try:
        for name in models:
            # Not counted: files get into the page cache, and the daemon asks the engine for its version and flags.
            first, _ = daemon.preload(name)
            launched = daemon.launched(name)
            daemon.stop(name)
            bare(engine, launched)
            requested, spawned, alone = [], [], []
            for turn in range(rounds):
                # Who comes first changes, so that neither always follows the other's end.
                if turn % 2:
                    alone.append(bare(engine, launched) * 1000)
                request, spawn = daemon.preload(name)
                daemon.stop(name)
                requested.append(request * 1000)
                spawned.append(spawn * 1000)
                if not turn % 2:
                    alone.append(bare(engine, launched) * 1000)
            out[name] = {
                "first_preload_ms": first * 1000,
                "request_to_ready_ms": requested,
                "spawn_to_ready_ms": spawned,
                "bare_ms": alone,
                "ratio": statistics.median(a / b for a, b in zip(spawned, alone)),
                "ratio_from_request": statistics.median(a / b for a, b in zip(requested, alone)),
                "lag_ms": statistics.median(a - b for a, b in zip(spawned, alone)),
                "lag_from_request_ms": statistics.median(a - b for a, b in zip(requested, alone)),
            }
    finally:
        daemon.close()
    return out


def memory_of(pid):
    found = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        key, value = line.split(":")
        found[key] = int(value.split()[0]) / MIB
    return {
        "rss_mib": found["Rss"],
        "pss_mib": found["Pss"],
        "private_mib": found["Private_Clean"] + found["Private_Dirty"],
        "anonymous_mib": found["Anonymous"],
    }


def children(pid):
    return [int(c) for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()]


def memory(binary, count=8, settle=3.0):
    pools = "".join(
        f'[[pool]]\nid = "p{n}"\nmodel = "stub:p{n}"\nengine = "stub"\nvram = "1 GiB"\nactivation = "on_demand"\n'
        for n in range(count)
    )
    daemon = Daemon(binary, pools)
    try:
        for n in range(count):
            daemon.verb(f"p{n}", "preload")
        time.sleep(settle)
        shims = children(daemon.process.pid)
        if len(shims) != count:
            raise RuntimeError(f"{len(shims)} children of the daemon instead of {count} shims")
        program = os.path.basename(os.readlink(f"/proc/{shims[0]}/exe"))
        return {
            "pools": count,
            "daemon": memory_of(daemon.process.pid),
            "shims": [memory_of(pid) for pid in shims],
            "shim_program": program,
        }
    finally:
        daemon.close()


def cold_starts(binary, rounds):
    took = []
    for _ in range(rounds + 1):
        daemon = Daemon(binary, "")
        took.append(daemon.cold_start_ms)
        daemon.close()
    return took[1:]  # the first fills the page cache


def second_daemons(binary, rounds):
    """Milliseconds until a second daemon on a state directory has ended with 75."""
    daemon, took = Daemon(binary, ""), []
    try:
        for _ in range(rounds):
            began = time.monotonic()
            second = start([binary, "serve", "--config", daemon.dir / "c.toml"], stderr=subprocess.DEVNULL)
            code = second.wait(TIMEOUT)
            took.append((time.monotonic() - began) * 1000)
            processes.remove(second)
            if code != 75:
                raise RuntimeError(f"a second daemon ended with {code}")
    finally:
        daemon.close()
    return took


def drains(binary, rounds, deadline_ms=2000):
    """Milliseconds after its deadline that a drain with three stuck leases ended, the engine deaf to SIGTERM."""
    pool = (
        '[[pool]]\nid = "p"\nmodel = "stub:p"\nengine = "stub"\nvram = "1 GiB"\nactivation = "on_demand"\n'
        'args = ["--ignore-sigterm"]\n'
    )
    daemon, late = Daemon(binary, pool), []
    try:
        for _ in range(rounds):
            daemon.verb("p", "preload")
            for _ in range(3):
                status, body = ask(daemon.port, "POST", "/v1/pools/p/leases", '{"ttl_ms":600000}')
                if status != 201:
                    raise RuntimeError(f"no lease: {status} {body.decode()[:500]}")
            began = time.monotonic()
            ended = daemon.verb("p", "drain", json.dumps({"deadline_ms": deadline_ms, "on_deadline": "force"}))
            late.append((ended - began) * 1000 - deadline_ms)
    finally:
        daemon.close()
    return late


def span(values):
    return f"{statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})"


def rows(result):
    """What, figure, goal, whether it is met (None: no goal)."""
    for name, s in result.get("starts", {}).items():
        yield f"{name}: bare, spawn → first token, ms", span(s["bare_ms"]), "", None
        yield f"{name}: daemon, spawn → Ready, ms", span(s["spawn_to_ready_ms"]), "", None
        yield f"{name}: daemon, preload request → Ready, ms", span(s["request_to_ready_ms"]), "", None
        yield f"{name}: daemon, first preload (asks version and flags), ms", f"{s['first_preload_ms']:.1f}", "", None
        if name == "tiny":
            yield f"{name}: lag, spawn → Ready, ms", f"{s['lag_ms']:.1f}", "≤ 100", s["lag_ms"] <= 100
            lag = s["lag_from_request_ms"]
            yield f"{name}: lag, request → Ready, ms", f"{lag:.1f}", "≤ 100", lag <= 100
        else:
            yield f"{name}: ratio, spawn → Ready", f"{s['ratio']:.3f}", "≤ 1.10", s["ratio"] <= 1.10
            ratio = s["ratio_from_request"]
            yield f"{name}: ratio, request → Ready", f"{ratio:.3f}", "≤ 1.10", ratio <= 1.10
    if m := result.get("memory"):
        d = m["daemon"]
        yield f"daemon with {m['pools']} stub pools, RSS, MiB", f"{d['rss_mib']:.2f}", "< 20", d["rss_mib"] < 20
        yield "the same, PSS, MiB", f"{d['pss_mib']:.2f}", "", None
        worst = {key: max(s[key] for s in m["shims"]) for key in m["shims"][0]}
        yield f"largest shim (`{m['shim_program']}`), RSS, MiB", f"{worst['rss_mib']:.2f}", "< 2", worst["rss_mib"] < 2
        yield "the same, PSS, MiB", f"{worst['pss_mib']:.2f}", "", None
        yield "the same, private, MiB", f"{worst['private_mib']:.2f}", "", None
        yield "the same, anonymous, MiB", f"{worst['anonymous_mib']:.2f}", "", None
    if c := result.get("cold_start_ms"):
        yield f"cold start, exec → /livez 200, ms (N={len(c)})", span(c), "< 50", statistics.median(c) < 50
    if s := result.get("second_daemon_ms"):
        yield f"second daemon, exec → exit 75, ms (N={len(s)})", span(s), "< 1000", max(s) < 1000
    if d := result.get("drain_late_ms"):
        what = f"drain, 3 stuck leases, deaf engine: after its 2 s deadline, ms (N={len(d)})"
        yield what, span(d), "≤ 2000", max(d) <= 2000


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print everything measured as JSON")
    parser.add_argument("--binary", type=Path, default=ROOT / "target/release/pool-managerd")
    parser.add_argument("--engine", type=Path, help="llama-server; by default what `cargo xtask engine` built")
    parser.add_argument("--rounds", type=int, default=20, help="starts of each kind (default 20)")
    parser.add_argument("--cold", type=int, default=20, help="cold starts (default 20)")
    parser.add_argument("--only", choices=["starts", "memory", "cold", "limits"], help="measure only this")
    options = parser.parse_args()
    # So that an end by signal stops what was started, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    source = ROOT / "target/engine/source/bin/llama-server"
    engine = (options.engine or (source if source.exists() else ROOT / "target/engine/bin/llama-server")).absolute()
    models = {
        "SmolLM2-135M": ROOT / "target/engine/models/smollm2-135m.gguf",
        "tiny": ROOT / "target/engine/models/tiny.gguf",
    }
    binary = options.binary.absolute()
    need = [binary] + ([engine, *models.values()] if options.only in (None, "starts") else [])
    if missing := [path for path in need if not path.exists()]:
        sys.exit(f"missing: {', '.join(map(str, missing))}; run `cargo build --release` and `cargo xtask engine`")
    result = {"cpus": os.cpu_count(), "load": os.getloadavg()[0], "engine": "source" if engine == source else "wheel"}
    if options.engine:
        result["engine"] = engine.name
    try:
        if options.only in (None, "cold"):
            result["cold_start_ms"] = cold_starts(binary, options.cold)
        if options.only in (None, "limits"):
            result["second_daemon_ms"] = second_daemons(binary, options.cold)
            result["drain_late_ms"] = drains(binary, options.rounds)
        if options.only in (None, "memory"):
            result["memory"] = memory(binary)
        if options.only in (None, "starts"):
            result["starts"] = starts(binary, engine, models, options.rounds)
    finally:
        for process in list(processes):
            stop(process)
    result["load_after"] = os.getloadavg()[0]
    table = list(rows(result))
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        print(f"Engine: {result['engine']}; {result['cpus']} CPUs; load {result['load']:.1f} → {result['load_after']:.1f}.")
        print("Median (least to most).\n")
        print("| what | figure | goal | met |\n|---|---|---|---|")
        for what, figure, goal, met in table:
            print(f"| {what} | {figure} | {goal} | {'' if met is None else 'yes' if met else 'NO'} |")
    return 0 if all(met is not False for *_, met in table) else 1


if __name__ == "__main__":
    sys.exit(main())
