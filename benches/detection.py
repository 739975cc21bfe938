#!/usr/bin/env python3
"""Kill -9 of an engine under several supervisors, a hang, and what each of ours takes while nothing happens.

    apt-get install runit s6 supervisor     # what is compared; one that is missing is left out
    cargo build --release && python3 benches/detection.py

Every supervisor runs the same stub engine. In each round each of them in turn has its engine killed; the order changes
from round to round, so that what else the machine does falls on all alike. Measured from the kill:

- crash seen: a bare `waitid` returns; the daemon's snapshot, asked for by long poll, no longer says `live`. The others
  tell nobody.
- serving again: `/health` of the engine answers 200, asked every 2 ms, and by how much that is later than a bare start
  of the same engine (its own load time, the median of as many bare starts).

Hangs: the stub engine, whose decoder stands still while /health stays ok; and a real llama-server (and llama-swap over
one, where it is installed) of which the thread that computes is stopped by ptrace.

Loopback, temporary directories, everything stopped at the end. Standard library only.
"""

import argparse
import ctypes
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from lifecycle import ROOT, Daemon, ask, children, free_port, memory_of, processes, start, stop  # noqa: E402

POLL = 0.002
PATIENCE = 60.0
TICK = os.sysconf("SC_CLK_TCK")


def serves(port):
    try:
        return ask(port, "GET", "/health", timeout=1.0)[0] == 200
    except Exception:
        return False


def wait_for(what, seen, pause=POLL, patience=PATIENCE):
    end = time.monotonic() + patience
    while not (found := seen()):
        if time.monotonic() > end:
            raise RuntimeError(f"{what} never came")
        time.sleep(pause)
    return found


def listener(port):
    """The process that listens on a port."""
    inode = None
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and int(fields[1].split(":")[1], 16) == port:
            inode = f"socket:[{fields[9]}]"
    for proc in Path("/proc").iterdir() if inode else ():
        if proc.name.isdigit():
            try:
                if any(os.readlink(fd) == inode for fd in (proc / "fd").iterdir()):
                    return int(proc.name)
            except OSError:
                continue
    return None


class Supervised:
    """An engine under somebody who starts it again."""

    def __init__(self, name, binary):
        self.name, self.port = name, free_port()
        self.dir = Path(tempfile.mkdtemp(prefix=f"detection-{name}-"))
        self.engine = [str(binary), "stub-engine", "--port", str(self.port)]

    def script(self, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/sh\nexec " + " ".join(self.engine) + " >/dev/null 2>&1\n")
        path.chmod(0o755)

    def run(self, command):
        self.process = start(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(f"{self.name}'s engine", lambda: serves(self.port))
        return self

    def kill(self):
        """Seconds until the crash was seen (None where nobody says so) and until the engine serves again."""
        pid = wait_for("listener", lambda: listener(self.port))
        began = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        wait_for("end", lambda: not serves(self.port), 0)
        wait_for("restart", lambda: serves(self.port))
        return None, time.monotonic() - began

    def close(self):
        stop(self.process)
        if pid := listener(self.port):
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.dir, ignore_errors=True)


class Runit(Supervised):
    def begin(self):
        self.script(self.dir / "engine/run")
        return self.run(["runsv", self.dir / "engine"])


class S6(Supervised):
    def begin(self):
        self.script(self.dir / "engine/run")
        return self.run(["s6-supervise", self.dir / "engine"])


class Supervisord(Supervised):
    def begin(self):
        config = self.dir / "supervisord.conf"
        config.write_text(
            f"[supervisord]\nnodaemon=true\nlogfile=/dev/null\nlogfile_maxbytes=0\npidfile={self.dir}/pid\nuser=root\n"
            f"[program:engine]\ncommand={' '.join(self.engine)}\nautorestart=true\nstdout_logfile=/dev/null\n"
            "redirect_stderr=true\n"
        )
        return self.run(["supervisord", "-c", config])


class Bare(Supervised):
    """The least that can be done: waitid, and start it again."""

    def begin(self):
        return self.run(self.engine)

    def kill(self):
        began = time.monotonic()
        os.kill(self.process.pid, signal.SIGKILL)
        os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        seen = time.monotonic() - began
        self.process.wait()
        processes.remove(self.process)
        self.process = start(self.engine, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for("restart", lambda: serves(self.port))
        return seen, time.monotonic() - began


class Ours(Supervised):
    """The first delay of its backoff as short as can be, so that what is measured is the daemon and not its patience."""

    POOL = (
        '[[pool]]\nid = "p"\nmodel = "stub:p"\nengine = "stub"\nactivation = "preload"\n'
        '[pool.backoff]\ninitial = "1ms"\nmax = "1ms"\n'
        "[pool.breaker]\nfailed_starts = 1000000\nearly_crashes = 1000000\n"
    )

    def begin(self):
        self.daemon = Daemon(self.engine[0], self.POOL)
        wait_for("Ready", lambda: self.view().get("ready"))
        return self

    def view(self, after=None):
        query = "" if after is None else f"?wait_for_snapshot={after}&wait_ms=30000"
        status, body = ask(self.daemon.port, "GET", f"/v1/pools/p{query}")
        return json.loads(body) if status == 200 else {}

    def kill(self):
        view = self.view()
        replica = view["replicas"][0]
        port, generation = int(replica["endpoint"].rsplit(":", 1)[1]), replica["generation"]
        began = time.monotonic()
        os.kill(replica["pid"], signal.SIGKILL)
        while (view := self.view(view["snapshot"]))["ready"] and view["replicas"][0]["generation"] == generation:
            pass
        seen = time.monotonic() - began
        # The next one may have another port, and is Ready only after it served.
        def again():
            replica = self.view()["replicas"][0]
            url = replica["endpoint"]
            return replica["generation"] > generation and url and serves(int(url.rsplit(":", 1)[1]))
        wait_for("restart", again)
        return seen, time.monotonic() - began

    def close(self):
        self.daemon.close()
        shutil.rmtree(self.dir, ignore_errors=True)


def load_time(binary, rounds):
    took = []
    for _ in range(rounds):
        port = free_port()
        began = time.monotonic()
        engine = start([binary, "stub-engine", "--port", port], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for("bare engine", lambda: serves(port))
        took.append(time.monotonic() - began)
        stop(engine)
    return statistics.median(took)


def crashes(binary, rounds):
    kinds = [(Bare, None), (Ours, None), (Runit, "runsv"), (S6, "s6-supervise"), (Supervisord, "supervisord")]
    there = [kind for kind, program in kinds if program is None or shutil.which(program)]
    load = load_time(binary, rounds)
    all_of_them = []
    figures = {}
    try:
        for kind in there:
            one = kind(kind.__name__.lower(), binary)
            all_of_them.append(one)
            one.begin()
        # Some of them are slower with an engine that has just been started.
        time.sleep(2)
        for turn in range(rounds):
            for one in all_of_them[turn % len(there) :] + all_of_them[: turn % len(there)]:
                seen, again = one.kill()
                of_one = figures.setdefault(one.name, {"seen_ms": [], "again_ms": []})
                if seen is not None:
                    of_one["seen_ms"].append(seen * 1000)
                of_one["again_ms"].append((again - load) * 1000)
            time.sleep(1.2)
    finally:
        for one in all_of_them:
            one.close()
    return {"load_ms": load * 1000, "rounds": rounds, "who": figures}


def hang(binary):
    """Seconds until a hang is found with the default health checks; what the engine's own health says all the while."""
    pool = (
        '[[pool]]\nid = "p"\nmodel = "stub:p"\nengine = "stub"\nactivation = "preload"\n'
        'args = ["--hang-after-requests", "1"]\n'
    )
    daemon = Daemon(binary, pool)
    view = lambda: json.loads(ask(daemon.port, "GET", "/v1/pools/p")[1])
    try:
        wait_for("Ready", lambda: ask(daemon.port, "GET", "/v1/pools/p")[0] == 200 and view()["ready"])
        began, replica = time.monotonic(), view()["replicas"][0]
        port = int(replica["endpoint"].rsplit(":", 1)[1])
        asked = well = 0
        while (now := view())["replicas"][0]["generation"] == replica["generation"] and now["live"]:
            asked += 1
            well += serves(port)
            time.sleep(0.25)
        return {"found_s": time.monotonic() - began, "health_asked": asked, "health_ok": well}
    finally:
        daemon.close()


# linux/ptrace.h
PTRACE_SEIZE, PTRACE_INTERRUPT = 0x4206, 0x4207


def freeze(pid, port):
    """Stops the one thread of a llama-server that computes, as a kernel that never ends on its GPU would; the threads
    that answer HTTP run on. Needs the right to trace the process."""
    spent = lambda: {int(t.name): sum(map(int, (t / "stat").read_text().rsplit(")", 1)[1].split()[11:13]))
                     for t in Path(f"/proc/{pid}/task").iterdir()}
    before = spent()
    body = {"prompt": "x", "max_tokens": 1500, "ignore_eos": True}
    for _ in range(3):
        ask(port, "POST", "/v1/completions", json.dumps(body))
    thread = max(after := spent(), key=lambda t: after[t] - before.get(t, 0))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    for request in (PTRACE_SEIZE, PTRACE_INTERRUPT):
        if libc.ptrace(request, thread, None, None) != 0:
            raise OSError(ctypes.get_errno(), "ptrace")
    return thread


def let_go(thread):
    """A traced thread that was killed is there until its tracer has waited for it."""
    try:
        os.waitpid(thread, 0x40000000 | os.WNOHANG)  # __WALL
    except ChildProcessError:
        pass


def put_down(pid, thread):
    """Ends an engine of which a thread may be traced."""
    if pid is not None:
        os.kill(pid, signal.SIGKILL)
    if thread is not None:
        wait_for("end of the traced thread", lambda: let_go(thread) or not Path(f"/proc/{thread}").exists(), 0.05)


def answers(port):
    try:
        return ask(port, "POST", "/v1/completions", json.dumps({"prompt": "x", "max_tokens": 1}), timeout=5.0)[0] == 200
    except Exception:
        return False


def watched(seconds, port, says, over):
    """What is said of a frozen engine until it is found, or for so many seconds."""
    began = time.monotonic()
    row = {"asked": 0, "health_ok": 0, "says_ok": 0, "found_s": None}
    while time.monotonic() - began < seconds:
        if over():
            row["found_s"] = time.monotonic() - began
            break
        row["asked"] += 1
        row["health_ok"] += serves(port)
        row["says_ok"] += says()
        time.sleep(0.25)
    return row


def frozen(binary, engine, model, llama_swap, seconds=60):
    """A real llama-server whose computing thread stands still: its own word, llama-swap's and ours."""
    rows, thread = {}, None
    port = free_port()
    alone = start([engine, "-m", model, "--port", port, "-t", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for("llama-server", lambda: serves(port))
        thread = freeze(alone.pid, port)
        rows["llama-server"] = watched(seconds, port, lambda: serves(port), lambda: False)
        rows["llama-server"]["answers"] = answers(port)
    finally:
        put_down(alone.pid, thread)
        stop(alone)

    if llama_swap:
        front, port = free_port(), free_port()
        home = Path(tempfile.mkdtemp(prefix="detection-llama-swap-"))
        (home / "c.yaml").write_text(
            f"models:\n  m:\n    proxy: http://127.0.0.1:{port}\n    cmd: {engine} -m {model} --port {port} -t 1\n"
        )
        pid = thread = None
        swap = start([llama_swap, "-config", home / "c.yaml", "-listen", f"127.0.0.1:{front}"],
                     stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_for("llama-swap", lambda: connects(front))
            ask(front, "POST", "/v1/completions", json.dumps({"model": "m", "prompt": "x", "max_tokens": 1}))
            pid = listener(port)
            thread = freeze(pid, port)
            ready = lambda: json.loads(ask(front, "GET", "/running")[1])["running"][0]["state"] == "ready"
            rows["llama-swap"] = watched(seconds, port, ready, lambda: listener(port) != pid)
            rows["llama-swap"]["answers"] = answers(port)
        finally:
            put_down(pid, thread)
            stop(swap)
            shutil.rmtree(home, ignore_errors=True)

    pool = (
        f'[[pool]]\nid = "p"\nmodel = "{model}"\nengine = "real"\ncontext = 2048\nactivation = "preload"\n'
        'args = ["-t", "1"]\n'
    )
    declared = f'[engines.real]\nkind = "llama.cpp"\nmode = "binary"\npath = "{engine}"\n'
    daemon = Daemon(binary, pool, declared, model.parent)
    view = lambda: json.loads(ask(daemon.port, "GET", "/v1/pools/p")[1])
    try:
        wait_for("Ready", lambda: view()["ready"])
        replica = view()["replicas"][0]
        port = int(replica["endpoint"].rsplit(":", 1)[1])
        thread = freeze(replica["pid"], port)
        over = lambda: let_go(thread) or not (now := view())["live"] or now["replicas"][0]["generation"] != replica["generation"]
        rows["pool-managerd"] = watched(seconds, port, lambda: view()["ready"], over)
        again = lambda: let_go(thread) or (now := view())["ready"] and now["replicas"][0]["generation"] > replica["generation"]
        began = time.monotonic()
        wait_for("restart", again)
        rows["pool-managerd"]["ready_again_s"] = time.monotonic() - began
        rows["pool-managerd"]["answers"] = answers(int(view()["replicas"][0]["endpoint"].rsplit(":", 1)[1]))
    finally:
        daemon.close()
    return {"seconds": seconds, "rows": rows}


def connects(port):
    try:
        return bool(ask(port, "GET", "/running", timeout=1.0))
    except Exception:
        return False


def ticks(pid):
    return sum(int(field) for field in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[11:13])


def idle(binary, count, seconds):
    pools = "".join(
        f'[[pool]]\nid = "p{n}"\nmodel = "stub:p{n}"\nengine = "stub"\nvram = "100 MiB"\nactivation = "preload"\n'
        for n in range(count)
    )
    daemon = Daemon(binary, pools)
    try:
        everyone = lambda: json.loads(ask(daemon.port, "GET", "/v1/pools")[1])
        wait_for("all Ready", lambda: sum(p["ready"] for p in everyone()) == count, 0.1)
        time.sleep(3)
        shims = children(daemon.process.pid)
        before = [ticks(pid) for pid in [daemon.process.pid, *shims]]
        time.sleep(seconds)
        after = [ticks(pid) for pid in [daemon.process.pid, *shims]]
        used = [(b - a) / TICK / seconds * 100 for a, b in zip(before, after)]
        return {
            "engines": count,
            "seconds": seconds,
            "daemon": memory_of(daemon.process.pid),
            "daemon_cpu_percent": used[0],
            "shims": [memory_of(pid) for pid in shims],
            "shims_cpu_percent": sum(used[1:]),
        }
    finally:
        daemon.close()


def spread(values):
    if not values:
        return ""
    ordered = sorted(values)
    return f"{statistics.median(ordered):.1f} / {ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]:.1f}"


def show(result):
    if c := result.get("crashes"):
        print(f"Engine killed, N={c['rounds']}, its own load time {c['load_ms']:.1f} ms. Median / p99, ms.\n")
        print("| who | crash seen | serving again, less the load time |\n|---|---|---|")
        for name, f in c["who"].items():
            print(f"| {name} | {spread(f['seen_ms'])} | {spread(f['again_ms'])} |")
    if h := result.get("hang"):
        print(f"\nHang found after {h['found_s']:.1f} s; /health said ok {h['health_ok']} times of {h['health_asked']}.")
    if f := result.get("frozen"):
        print(f"\nThe computing thread of a real llama-server stopped, watched for at most {f['seconds']} s.\n")
        print("| who | found after | engine's /health said ok | who said ok of it | answers at the end |\n|---|---|---|---|---|")
        for name, r in f["rows"].items():
            found = "not found" if r["found_s"] is None else f"{r['found_s']:.1f} s"
            print(f"| {name} | {found} | {r['health_ok']} of {r['asked']} | {r['says_ok']} of {r['asked']} | {'yes' if r['answers'] else 'no'} |")
    if result.get("idle"):
        print("\n| engines | daemon RSS / PSS, MiB | daemon CPU, % | largest shim RSS / PSS, MiB | all shims CPU, % |")
        print("|---|---|---|---|---|")
        for i in result["idle"]:
            d, s = i["daemon"], max(i["shims"], key=lambda m: m["rss_mib"])
            print(
                f"| {i['engines']} | {d['rss_mib']:.2f} / {d['pss_mib']:.2f} | {i['daemon_cpu_percent']:.2f} "
                f"| {s['rss_mib']:.2f} / {s['pss_mib']:.2f} | {i['shims_cpu_percent']:.2f} |"
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print everything measured as JSON")
    parser.add_argument("--binary", type=Path, default=ROOT / "target/release/pool-managerd")
    parser.add_argument("--rounds", type=int, default=30, help="kills under each supervisor (default 30)")
    parser.add_argument("--idle", type=float, default=30.0, help="seconds of rest (default 30)")
    parser.add_argument("--only", choices=["crashes", "hang", "frozen", "idle"], help="measure only this")
    parser.add_argument("--engine", type=Path, help="llama-server; by default what `cargo xtask engine` built")
    parser.add_argument("--llama-swap", default=shutil.which("llama-swap"), help="llama-swap; left out when missing")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    binary = options.binary.absolute()
    if not binary.exists():
        sys.exit(f"missing: {binary}; run `cargo build --release`")
    wanted = lambda what: options.only in (None, what)
    result = {"cpus": os.cpu_count(), "load": os.getloadavg()[0]}
    try:
        if wanted("crashes"):
            result["crashes"] = crashes(binary, options.rounds)
        if wanted("hang"):
            result["hang"] = hang(binary)
        if wanted("frozen"):
            source = ROOT / "target/engine/source/bin/llama-server"
            engine = options.engine or (source if source.exists() else ROOT / "target/engine/bin/llama-server")
            model = ROOT / "target/engine/models/tiny.gguf"
            if engine.exists() and model.exists():
                result["frozen"] = frozen(binary, engine.absolute(), model, options.llama_swap)
        if wanted("idle"):
            result["idle"] = [idle(binary, count, options.idle) for count in (8, 64)]
    finally:
        for process in list(processes):
            stop(process)
    result["load_after"] = os.getloadavg()[0]
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        print(f"{result['cpus']} CPUs; load {result['load']:.1f} → {result['load_after']:.1f}.\n")
        show(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
