#!/usr/bin/env python3
"""Fetching a model beside curl, on loopback: time and CPU for each GiB; and how long it takes to see that one is there.

    cargo build --release -p model-store --example fetch && python3 benches/staging.py

One server (sendfile) serves one file to each in turn; the order changes from round to round. The store hashes while it
fetches, syncs the file and publishes it; curl only writes, so `curl, then sha256sum, then sync` stands beside it as what a
script would do. Server's CPU is not counted. Everything lies in a temporary directory and is removed at the end.
Standard library only.
"""

import argparse
import json
import os
import resource
import shutil
import socket
import statistics
import subprocess
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FETCH = ROOT / "target/release/examples/fetch"
GIB = 1 << 30


class Server:
    """Sends files whole, by the kernel."""

    def __init__(self, folder):
        self.folder = folder
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=16)
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                stream, _ = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self.serve, args=(stream,), daemon=True).start()

    def serve(self, stream):
        with stream:
            head = b""
            while b"\r\n\r\n" not in head:
                head += stream.recv(65536)
            name = head.split(b" ", 2)[1].decode().lstrip("/")
            with open(self.folder / name, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                answer = f'HTTP/1.1 200 OK\r\nContent-Length: {size}\r\nETag: "1"\r\nConnection: close\r\n\r\n'
                stream.sendall(answer.encode())
                stream.sendfile(file)


def measured(command, **more):
    """Seconds and CPU seconds of a command, and what it printed."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(command, check=True, capture_output=True, text=True, **more)
    seconds, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return seconds, cpu, done.stdout


def make(path, size):
    """A GGUF by its first bytes, and then nothing that could be left out by a disk."""
    block = os.urandom(1 << 20)
    with open(path, "wb") as file:
        file.write(b"GGUF\x03\0\0\0" + block[8:])
        while file.tell() < size:
            file.write(block[: min(len(block), size - file.tell())])


def spread(values, form="{:.2f}"):
    low, high = form.format(min(values)), form.format(max(values))
    return f"{form.format(statistics.median(values))} ({low} to {high})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the model that is fetched")
    parser.add_argument("--present-gib", type=float, default=4.0, help="size of the model that is there")
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="staging-"))
    try:
        (work / "served").mkdir()
        size, present = int(args.gib * GIB), int(args.present_gib * GIB)
        make(work / "served/model.gguf", size)
        server = Server(work / "served")
        url = f"http://127.0.0.1:{server.port}"

        def store():
            shutil.rmtree(work / "cache", ignore_errors=True)
            return measured([FETCH, work / "cache", f"{url}/model.gguf"])

        def curl():
            return measured(["curl", "-sSf", "-o", work / "curl.gguf", f"{url}/model.gguf"])

        def script():
            file = work / "curl.gguf"
            line = f"curl -sSf -o '{file}' '{url}/model.gguf' && sha256sum '{file}' && sync '{file}'"
            return measured(["sh", "-c", line])

        kinds = {"the store": store, "curl": curl, "curl, then sha256sum, then sync": script}
        seen = {name: [] for name in kinds}
        for turn in range(args.rounds + 1):
            order = list(kinds)[turn % len(kinds) :] + list(kinds)[: turn % len(kinds)]
            for name in order:
                seconds, cpu, _ = kinds[name]()
                # The first round fills the page cache.
                if turn:
                    seen[name].append((seconds, cpu))
        print(f"{args.gib:g} GiB, {args.rounds} rounds, median (least to most):\n")
        print("| what | s per GiB | CPU s per GiB | GiB/s |\n|---|---|---|---|")
        for name, runs in seen.items():
            seconds, cpu = [s / args.gib for s, _ in runs], [c / args.gib for _, c in runs]
            print(f"| {name} | {spread(seconds)} | {spread(cpu)} | {1 / statistics.median(seconds):.2f} |")
        ratio = [a[0] / b[0] for a, b in zip(seen["the store"], seen["curl, then sha256sum, then sync"])]
        bare = [a[0] / b[0] for a, b in zip(seen["the store"], seen["curl"])]
        print(f"| ratio of times: store / curl with sha256sum and sync | {spread(ratio)} | | |")
        print(f"| ratio of times: store / bare curl | {spread(bare)} | | |")
        (work / "curl.gguf").unlink()
        shutil.rmtree(work / "cache")
        os.rename(work / "served/model.gguf", work / "served/small.gguf")
        make(work / "served/model.gguf", present)
        measured([FETCH, work / "cache", f"{url}/model.gguf"])
        inside, whole = [], []
        for _ in range(20):
            seconds, _, out = measured([FETCH, work / "cache", f"{url}/model.gguf"])
            whole.append(seconds * 1000)
            inside.append(json.loads(out)["seconds"] * 1000)
        print(f"\n{args.present_gib:g} GiB that is there, ms: {spread(inside)}; whole process {spread(whole)} (goal < 50)")
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
