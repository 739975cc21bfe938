#!/usr/bin/env python3
"""What the gateway adds to a request, beside nginx and llama-swap, with one stub engine behind all of them.

    apt-get install wrk nginx-light            # what is missing is left out; --llama-swap PATH adds one
    cargo build --release && python3 benches/gateway.py

The engine is one that the daemon started; nginx and llama-swap are led to the same one, so that only what is between
differs. In each round every way is measured in turn, in another order from round to round, by wrk:

- latency: one connection, one chat completion of one token after the other; median and 99th percentile, less that of
  the direct way in the same round.
- throughput: 16 connections; requests per second, and per second of processor time of the proxy (its processes alone).
- streams: 1,000 connections, each a stream of 40 tokens at 20 tokens/s; memory and processor time of the proxy.

Loopback, temporary directories, everything stopped at the end. Standard library only.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from detection import wait_for  # noqa: E402
from lifecycle import ROOT, Daemon, ask, children, free_port, processes, start, stop  # noqa: E402

TICK = os.sysconf("SC_CLK_TCK")
POOLS = """
[[pool]]
id = "fast"
model = "stub:fast"
engine = "stub"
slots = 64
args = ["--slots", "64", "--tokens-per-second", "0"]
activation = "preload"
[[pool]]
id = "slow"
model = "stub:slow"
engine = "stub"
slots = 1024
context = 262144
args = ["--slots", "1024", "--tokens-per-second", "20"]
activation = "preload"
"""
# wrk tells nothing in a form for programs but what a script prints.
SCRIPT = """
wrk.method = "POST"
wrk.body = '%s'
wrk.headers["Content-Type"] = "application/json"
local bad = 0
done = function(summary, latency, requests)
  io.write(string.format("RESULT %%d %%d %%d %%d %%d %%d\\n", summary.requests, summary.duration,
    latency:percentile(50), latency:percentile(99),
    summary.errors.status, summary.errors.connect + summary.errors.read + summary.errors.write + summary.errors.timeout))
end
"""


def body(model, tokens, stream):
    return json.dumps({
        "model": model, "max_tokens": tokens, "stream": stream, "messages": [{"role": "user", "content": "Hello"}],
    })


def wrk(home, port, text, connections, seconds, threads=1):
    script = home / "load.lua"
    script.write_text(SCRIPT % text)
    command = ["wrk", f"-t{threads}", f"-c{connections}", f"-d{seconds}s", "--timeout", "60s", "-s", str(script),
               f"http://127.0.0.1:{port}/v1/chat/completions"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    requests, micros, p50, p99, status, broken = map(int, re.search(r"RESULT (.*)", told)[1].split())
    return {"requests": requests, "rate": requests / (micros / 1e6), "p50": p50 / 1000, "p99": p99 / 1000,
            "bad": status + broken}


def tree(pid):
    """A process and what is below it, without engines of the daemon's."""
    found = [pid]
    for parent in found:
        found += [child for child in children(parent) if child not in found]
    return [p for p in found if b"engine-shim" not in cmdline(p) and b"stub-engine" not in cmdline(p)]


def cmdline(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def cpu(pids):
    total = 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        total += int(fields[11]) + int(fields[12])
    return total / TICK


def resident(pids):
    total = 0
    for pid in pids:
        try:
            total += int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1])
        except (OSError, TypeError):
            continue
    return total / 1024


class Way:
    """How a request comes to the engine: a port, and the process that it goes through."""

    def __init__(self, name, port, process=None):
        self.name, self.port, self.process = name, port, process

    def pids(self):
        return tree(self.process.pid) if self.process else []


def serves(port, model):
    try:
        return ask(port, "POST", "/v1/chat/completions", body(model, 1, False), timeout=5.0)[0] == 200
    except Exception:
        return False


def nginx(home, engine):
    port = free_port()
    (home / "nginx").mkdir(exist_ok=True)
    conf = home / "nginx" / f"{port}.conf"
    conf.write_text(f"""daemon off; pid {home}/nginx/{port}.pid; error_log /dev/null; worker_processes 1;
events {{ worker_connections 8192; }}
http {{ access_log off; client_body_temp_path {home}/nginx/body; proxy_temp_path {home}/nginx/proxy;
  fastcgi_temp_path {home}/nginx/f; uwsgi_temp_path {home}/nginx/u; scgi_temp_path {home}/nginx/s;
  upstream engine {{ server 127.0.0.1:{engine}; keepalive 1024; }}
  server {{ listen 127.0.0.1:{port};
    location / {{ proxy_pass http://engine; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off; }} }} }}
""")
    process = start(["nginx", "-c", conf], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return Way("nginx", port, process)


def llama_swap(path, home, engine, model):
    port = free_port()
    conf = home / f"swap-{port}.yaml"
    # The engine runs already: what it starts in its place only has to be there.
    conf.write_text(f"models:\n  {model}:\n    proxy: http://127.0.0.1:{engine}\n    cmd: sleep 86400\n"
                    f"    checkEndpoint: /health\n    concurrencyLimit: 4096\n")
    process = start([path, "-config", conf, "-listen", f"127.0.0.1:{port}"],
                    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return Way("llama-swap", port, process)


def ways(options, home, daemon, pool):
    view = json.loads(ask(daemon.port, "GET", f"/v1/pools/{pool}")[1])
    engine = int(view["replicas"][0]["endpoint"].rsplit(":", 1)[1].rstrip("/"))
    out = [Way("direct", engine), Way("pool-managerd", daemon.port, daemon.process)]
    if shutil.which("nginx"):
        out.append(nginx(home, engine))
    if options.llama_swap:
        out.append(llama_swap(options.llama_swap, home, engine, pool))
    for way in out:
        wait_for(way.name, lambda way=way: serves(way.port, pool))
    return out


def turn(all_ways, nth):
    return all_ways[nth % len(all_ways) :] + all_ways[: nth % len(all_ways)]


def spread(values, digits=3):
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def requests(options, home, daemon):
    all_ways = ways(options, home, daemon, "fast")
    text = body("fast", 1, False)
    seen = {way.name: {"p50": [], "p99": [], "rate": [], "per_cpu": [], "bad": 0} for way in all_ways}
    for nth in range(options.rounds):
        base = None
        # The direct way first: the others are compared with it.
        for way in all_ways[:1] + turn(all_ways[1:], nth):
            one = wrk(home, way.port, text, 1, options.seconds)
            base = base or one
            row = seen[way.name]
            row["p50"].append(one["p50"] - base["p50"])
            row["p99"].append(one["p99"] - base["p99"])
            row["bad"] += one["bad"]
        for way in turn(all_ways, nth):
            before = cpu(way.pids())
            many = wrk(home, way.port, text, 16, options.seconds)
            used = cpu(way.pids()) - before
            row = seen[way.name]
            row["rate"].append(many["rate"])
            row["per_cpu"].append(many["requests"] / used if used else float("nan"))
            row["bad"] += many["bad"]
    for way in all_ways:
        seen[way.name]["resident"] = resident(way.pids())
        if way.process and way.process is not daemon.process:
            stop(way.process)
    return seen


def streams(options, home, daemon):
    all_ways = ways(options, home, daemon, "slow")
    text = body("slow", 40, True)
    seen = {}
    for way in all_ways:
        before, began = cpu(way.pids()), time.monotonic()
        load = wrk(home, way.port, text, options.streams, options.stream_seconds, threads=1)
        took, used = time.monotonic() - began, cpu(way.pids()) - before
        seen[way.name] = {"streams": load["requests"], "bad": load["bad"], "cpu": 100 * used / took,
                          "resident": resident(way.pids()), "p50": load["p50"]}
    for way in all_ways:
        if way.process and way.process is not daemon.process:
            stop(way.process)
    return seen


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--binary", default=ROOT / "target/release/pool-managerd", type=Path)
    options.add_argument("--llama-swap", default=shutil.which("llama-swap"))
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--seconds", type=int, default=5)
    options.add_argument("--streams", type=int, default=1000)
    options.add_argument("--stream-seconds", type=int, default=20)
    options = options.parse_args()
    home = Path(tempfile.mkdtemp(prefix="gateway-"))
    daemon = Daemon(options.binary, POOLS)
    try:
        for pool in ("fast", "slow"):
            wait_for(pool, lambda pool=pool: json.loads(ask(daemon.port, "GET", f"/v1/pools/{pool}")[1])["ready"])
        asked = requests(options, home, daemon)
        print("| way | added p50, ms | added p99, ms | requests/s | requests per CPU second | resident after, MiB | failed |")
        print("|---|---|---|---|---|---|---|")
        for name, row in asked.items():
            per = "" if name == "direct" else spread(row["per_cpu"], 0)
            held = "" if name == "direct" else f"{row['resident']:.1f}"
            print(f"| {name} | {spread(row['p50'])} | {spread(row['p99'])} | {spread(row['rate'], 0)} | {per} | {held} | {row['bad']} |")
        streamed = streams(options, home, daemon)
        print(f"\n| way | streams ended | took, ms (p50; 2,000 at 20 tokens/s) | CPU, % of a core | resident, MiB | failed |")
        print("|---|---|---|---|---|---|")
        for name, row in streamed.items():
            held = "" if name == "direct" else f"{row['cpu']:.1f} | {row['resident']:.1f}"
            print(f"| {name} | {row['streams']} | {row['p50']:.0f} | {held or ' | '} | {row['bad']} |")
    finally:
        daemon.close()
        for process in list(processes):
            stop(process)
        shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main()
