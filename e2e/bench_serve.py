"""Serves one GGUF file with this worker, llama.cpp's llama-server and mistral.rs, sends
each the same requests of a trace, and prints what came of it as JSON.

Usage: bench_serve.py WORKER MODEL TRACE LLAMA_SERVER MISTRALRS_PYTHON

LLAMA_SERVER is that program, MISTRALRS_PYTHON a Python with mistral.rs in it; "" leaves
a peer out. Servers are started anew for each run, so that none knows the prompts of the
run before, and one at a time.
Environment: CONTEXT (tokens, 512), THREADS ("1 2"), SWEEP (open requests, "1 8 16"),
PER_OPEN (requests a place, 2), RUN_SECONDS (a run ends unanswered after so many, 60),
ALL_SECONDS (runs that have not begun then are left out, 600).
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

CONTEXT = int(os.environ.get("CONTEXT", "512"))
THREADS = [int(number) for number in os.environ.get("THREADS", "1 2").split()]
SWEEP = [int(number) for number in os.environ.get("SWEEP", "1 8 16").split()]
PER_OPEN = int(os.environ.get("PER_OPEN", "2"))
# Fewer say little of a percentile.
LEAST_REQUESTS = 4
SECONDS = int(os.environ.get("RUN_SECONDS", "60"))
ALL_SECONDS = int(os.environ.get("ALL_SECONDS", "600"))
START_SECONDS = 60


def say(text):
    print(f"  bench: {text}", file=sys.stderr, flush=True)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def ours(program, model, threads, port):
    return [
        program, "serve", "--model", model, "--served-name", "bench",
        "--max-tokens", str(CONTEXT), "--threads-per-rank", str(threads),
        "--max-sequences", str(max(SWEEP)), "--bind", "127.0.0.1",
        "--api-port", str(port), "--internal-port", str(free_port()),
    ]  # fmt: skip


def ours_anew(program, model, threads, port):
    return [*ours(program, model, threads, port), "--no-prefix-caching"]


def llama_cpp(program, model, threads, port):
    places = max(SWEEP)
    return [
        program, "--model", model, "--alias", "bench", "--threads", str(threads),
        "--threads-batch", str(threads), "--parallel", str(places),
        "--ctx-size", str(CONTEXT * places), "--host", "127.0.0.1", "--port", str(port),
    ]  # fmt: skip


def mistral_rs(python, model, threads, port):
    # How many threads compute is told by the environment.
    program = os.path.join(os.path.dirname(__file__), "mistralrs_serve.py")
    return [python, program, model, str(port), str(max(SWEEP))]


class Server:
    """A server while it runs, in a group of its own."""

    def __init__(self, command, threads, port):
        self.port = port
        self.log = tempfile.TemporaryFile("w+")
        environment = {
            **os.environ, "HF_HUB_OFFLINE": "1", "RAYON_NUM_THREADS": str(threads),
        }  # fmt: skip
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log,
            start_new_session=True, env=environment,
        )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self.process.poll() is None:
                os.killpg(self.process.pid, number)
                try:
                    self.process.wait(10)
                except subprocess.TimeoutExpired:
                    pass
        self.log.close()

    def why(self):
        self.log.seek(0)
        lines = [line.strip() for line in self.log.read().splitlines() if line.strip()]
        return " | ".join(lines[-3:])[-600:] or "it said nothing"

    def wait(self):
        """What went wrong, or None once it answers."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                return f"ended with {self.process.returncode}: {self.why()}"
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2):
                    return None
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        return f"not ready within {START_SECONDS} s: {self.why()}"


def run(command, threads, port, worker, trace, concurrency):
    requests = max(LEAST_REQUESTS, PER_OPEN * concurrency)
    with Server(command, threads, port) as server:
        if wrong := server.wait():
            return {"failed": wrong}
        replay = [
            worker, "replay", "--endpoint", f"http://127.0.0.1:{port}", "--model", "bench",
            "--trace", trace, "--requests", str(requests), "--context", str(CONTEXT),
            "--concurrency", str(concurrency), "--timeout", str(SECONDS),
        ]  # fmt: skip
        load = os.getloadavg()[0]
        try:
            done = subprocess.run(replay, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return {"failed": f"not answered within {SECONDS} s"}
    if done.returncode != 0:
        return {"failed": done.stderr.strip()[-600:]}
    return {"load_average_before": load, **json.loads(done.stdout)}


def ratio(own, other):
    """How many times as good as `other`; more than 1 is better."""
    # A run that did not come to an end says why in words.
    if any(isinstance(run.get("failed"), str) for run in (own, other)):
        return None

    def of(a, b):
        return round(a / b, 3) if a and b else None

    def latency(name):
        return of(other[name]["p50"], own[name]["p50"])

    return {
        "tokens_per_second": of(own["tokens_per_second"], other["tokens_per_second"]),
        "completion_tokens_per_second": of(
            own["completion_tokens_per_second"], other["completion_tokens_per_second"]
        ),
        "time_to_first_token_p50": latency("time_to_first_token_seconds"),
        "inter_token_latency_p50": latency("inter_token_latency_seconds"),
    }


def stop(*_):
    sys.exit("bench: ended from outside")


def main():
    # So that no server outlives an end from outside.
    signal.signal(signal.SIGTERM, stop)
    worker, model, trace, llama_server, mistralrs_python = sys.argv[1:]
    servers = {"ours": (ours, worker), "ours_without_prefix_caching": (ours_anew, worker)}
    report = {"model": os.path.basename(model), "trace": os.path.basename(trace), "context": CONTEXT}
    report |= {"cores": os.cpu_count(), "load_average": os.getloadavg(), "runs": []}
    if llama_server:
        servers["llama_cpp"] = (llama_cpp, llama_server)
    if mistralrs_python:
        servers["mistral_rs"] = (mistral_rs, mistralrs_python)
    missing = {"llama_cpp": llama_server, "mistral_rs": mistralrs_python}
    broken = {name: "it is not installed" for name, program in missing.items() if not program}
    left_out, begun = [], time.monotonic()
    for threads in THREADS:
        for concurrency in SWEEP:
            took = {"threads": threads, "concurrency": concurrency}
            for name, (command, program) in servers.items():
                if name in broken:
                    continue
                if time.monotonic() - begun > ALL_SECONDS:
                    left_out.append({"server": name, "threads": threads, "concurrency": concurrency})
                    continue
                say(f"{name}, {threads} threads, {concurrency} open")
                port = free_port()
                arguments = command(program, model, threads, port)
                took[name] = run(arguments, threads, port, worker, trace, concurrency)
                failed = took[name].get("failed")
                if isinstance(failed, str) and ("ended with" in failed or "not ready" in failed):
                    broken[name] = failed
            if "ours" not in took:
                continue
            peers = [name for name in took if name in servers and name != "ours"]
            took["ratio_to"] = {name: ratio(took["ours"], took[name]) for name in peers}
            report["runs"].append(took)
    report["cannot_serve"] = broken
    report["left_out"] = left_out
    report["load_average_after"] = os.getloadavg()
    print(json.dumps(report, indent=1))


main()
