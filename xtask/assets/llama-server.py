#!/usr/bin/env python3
"""llama.cpp's real HTTP server behind llama-server's own command line.

The server is the C++ one that the Python package xllamacpp links in; this file only turns flags into its parameters.
One difference: SIGTERM ends it at once with 0, even with a request in flight, where llama-server lingers until the next
SSE ping of a stream (--sse-ping-interval) or the end of the request.
Put there by `cargo xtask engine`, which also installs the package beside it (../site).
"""

import os
import signal
import sys
import threading

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.realpath(__file__))), "site"))

USAGE = """usage: llama-server -m FILE [options]

-h,    --help                  print usage and exit
       --version               show version and build info
-m,    --model FILE            model path to load
-a,    --alias NAMES           comma-separated model name aliases
       --host HOST             address to listen on (default: 127.0.0.1); a path ending in .sock is a unix socket
       --port PORT             port to listen on (default: 8080)
-c,    --ctx-size N            size of the prompt context (default: 0, 0 = from the model)
-np,   --parallel N            number of slots (default: 1)
-b,    --batch-size N          logical batch size
-ub,   --ubatch-size N         physical batch size
-t,    --threads N             threads for generation
-tb,   --threads-batch N       threads for prompts
-ngl,  --gpu-layers, --n-gpu-layers N   accepted: this build has no GPU
-dev,  --device LIST           accepted: this build has no GPU
-sm,   --split-mode MODE       accepted: this build has no GPU
-mg,   --main-gpu N            accepted: this build has no GPU
-ts,   --tensor-split LIST     fractions per device
-fa,   --flash-attn on|off|auto
-ctk,  --cache-type-k TYPE     f32, f16, bf16, q8_0, q4_0, q4_1, iq4_nl, q5_0, q5_1
-ctv,  --cache-type-v TYPE
       --api-key KEY           comma-separated API keys
       --api-key-file FNAME    one API key a line
       --metrics               serve /metrics
       --slots, --no-slots     serve /slots
       --props                 allow POST /props
       --no-ui, --no-webui     no web page
       --embedding, --embeddings   serve only embeddings
       --rerank, --reranking   serve only reranking
       --pooling TYPE          none, mean, cls, last, rank
       --slot-save-path PATH
       --sse-ping-interval N   seconds between pings of an idle stream (default: 30)
       --sleep-idle-seconds N
       --jinja, --no-jinja, --no-warmup, --warmup, --mlock, --log-disable, --fit VALUE   accepted
"""


def fail(message):
    print("error: " + message, file=sys.stderr, flush=True)
    sys.exit(1)


def number(text):
    try:
        return int(text)
    except ValueError:
        raise ValueError("stoi") from None


# flag → (canonical name, kind); kind None is a switch.
FLAGS = {}


def flag(name, kind, *spellings):
    for spelling in spellings:
        FLAGS[spelling] = (name, kind)


flag("help", None, "-h", "--help", "--usage")
flag("version", None, "--version")
flag("model", str, "-m", "--model")
flag("alias", str, "-a", "--alias")
flag("host", str, "--host")
flag("port", number, "--port")
flag("ctx_size", number, "-c", "--ctx-size")
flag("parallel", number, "-np", "--parallel")
flag("batch", number, "-b", "--batch-size")
flag("ubatch", number, "-ub", "--ubatch-size")
flag("threads", number, "-t", "--threads")
flag("threads_batch", number, "-tb", "--threads-batch")
flag("tensor_split", str, "-ts", "--tensor-split")
flag("flash_attn", str, "-fa", "--flash-attn")
flag("cache_k", str, "-ctk", "--cache-type-k")
flag("cache_v", str, "-ctv", "--cache-type-v")
flag("api_key", str, "--api-key")
flag("api_key_file", str, "--api-key-file")
flag("metrics", None, "--metrics")
flag("slots", None, "--slots")
flag("no_slots", None, "--no-slots")
flag("props", None, "--props")
flag("no_ui", None, "--no-ui", "--no-webui")
flag("embeddings", None, "--embedding", "--embeddings")
flag("rerank", None, "--rerank", "--reranking")
flag("pooling", str, "--pooling")
flag("slot_save_path", str, "--slot-save-path")
flag("sse_ping", number, "--sse-ping-interval")
flag("sleep_idle", number, "--sleep-idle-seconds")
flag("accepted", str, "-ngl", "--gpu-layers", "--n-gpu-layers", "-dev", "--device", "-sm", "--split-mode", "-mg",
     "--main-gpu", "-fit", "--fit")
flag("accepted", None, "--jinja", "--no-jinja", "--no-warmup", "--warmup", "--mlock", "--log-disable", "--ui", "--webui")

CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")


def parse(argv):
    found, at = {}, 0
    while at < len(argv):
        arg = argv[at]
        if arg not in FLAGS:
            fail("invalid argument: " + arg)
        name, kind = FLAGS[arg]
        if kind is None:
            found[name] = True
        else:
            at += 1
            if at == len(argv):
                fail("expected value for argument")
            try:
                found[name] = kind(argv[at])
            except ValueError as error:
                fail('error while handling argument "%s": %s' % (arg, error))
        at += 1
    return found


def parameters(x, given):
    p = x.CommonParams()
    p.model.path = given["model"]
    p.hostnames = [given.get("host", "127.0.0.1")]
    p.port = given.get("port", 8080)
    p.n_ctx = given.get("ctx_size", 0)
    p.n_parallel = max(1, given.get("parallel", 1))
    p.n_batch = given.get("batch", p.n_batch)
    p.n_ubatch = given.get("ubatch", p.n_ubatch)
    p.endpoint_metrics = "metrics" in given
    p.endpoint_slots = "no_slots" not in given
    p.endpoint_props = "props" in given
    p.ui = "no_ui" not in given
    p.embedding = "embeddings" in given or "rerank" in given
    p.sse_ping_interval = given.get("sse_ping", p.sse_ping_interval)
    p.sleep_idle_seconds = given.get("sleep_idle", p.sleep_idle_seconds)
    if "alias" in given:
        p.model_alias = {name.strip() for name in given["alias"].split(",")}
    if given.get("threads", -1) > 0:
        p.cpuparams.n_threads = given["threads"]
    if given.get("threads_batch", given.get("threads", -1)) > 0:
        p.cpuparams_batch.n_threads = given.get("threads_batch", given.get("threads"))
    if "slot_save_path" in given:
        p.slot_save_path = os.path.join(given["slot_save_path"], "")
    keys = [key for key in given.get("api_key", "").split(",") if key]
    if "api_key_file" in given:
        try:
            with open(given["api_key_file"], encoding="utf-8") as lines:
                keys += [line.strip() for line in lines if line.strip()]
        except OSError:
            fail("failed to open file '%s'" % given["api_key_file"])
    p.api_keys = keys
    if "flash_attn" in given:
        kinds = x.llama_flash_attn_type
        values = {"on": kinds.LLAMA_FLASH_ATTN_TYPE_ENABLED, "off": kinds.LLAMA_FLASH_ATTN_TYPE_DISABLED,
                  "auto": kinds.LLAMA_FLASH_ATTN_TYPE_AUTO}
        values.update({"1": values["on"], "0": values["off"], "-1": values["auto"]})
        if given["flash_attn"] not in values:
            fail("unknown value for --flash-attn: '%s'" % given["flash_attn"])
        p.flash_attn_type = values[given["flash_attn"]]
    for name in ("cache_k", "cache_v"):
        if name in given:
            if given[name] not in CACHE_TYPES:
                fail("Unsupported cache type: " + given[name])
            setattr(p, name.replace("cache_", "cache_type_"), cache_type(x, given[name]))
    if "pooling" in given or "rerank" in given:
        kind = "rank" if "rerank" in given else given["pooling"]
        member = getattr(x.llama_pooling_type, "LLAMA_POOLING_TYPE_" + kind.upper(), None)
        if member is None:
            fail("invalid value for --pooling: " + kind)
        p.pooling_type = member
    if "tensor_split" in given:
        split = [0.0] * len(p.tensor_split)
        try:
            parts = [float(part) for part in given["tensor_split"].replace("/", ",").split(",")]
        except ValueError:
            fail('error while handling argument "--tensor-split": stof')
        if len(parts) > len(split):
            fail("got %d input configs, but system only has %d devices" % (len(parts), len(split)))
        split[:len(parts)] = parts
        p.tensor_split = split
    return p


def cache_type(x, name):
    for member in (name.upper(), name):
        found = getattr(x.ggml_type, "GGML_TYPE_" + member, None)
        if found is not None:
            return found
    return fail("Unsupported cache type: " + name)


def main():
    given = parse(sys.argv[1:])
    if "help" in given:
        print(USAGE)
        return 0
    import xllamacpp as x  # after the parse: bad flags are told at once

    if "version" in given:
        version = getattr(x, "__version__", None) or x._version.version
        build = version.split("+")[0].rsplit(".", 1)[-1]
        print("version: %s (xllamacpp %s)" % (build, version), file=sys.stderr)
        return 0
    if "model" not in given:
        fail("no model given: -m FILE")
    stop = threading.Event()
    for number_ in (signal.SIGTERM, signal.SIGINT):
        # The second signal ends the process at once, as llama-server's own handler does.
        signal.signal(number_, lambda *_: os._exit(1) if stop.is_set() else stop.set())
    if not os.path.isfile(given["model"]):
        fail("failed to load model, '%s'" % given["model"])
    try:
        server = x.Server(parameters(x, given))
    except RuntimeError as error:
        fail(str(error))
    print("main: server is listening on " + str(server.listening_address), file=sys.stderr, flush=True)
    while not stop.wait(3600):
        pass
    sys.stderr.flush()
    os._exit(0)  # no stage of Python's own exit may outlive the server


if __name__ == "__main__":
    sys.exit(main())
