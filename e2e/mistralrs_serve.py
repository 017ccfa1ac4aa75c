"""Puts HTTP in front of mistral.rs, whose Python package brings an engine and no server:
`/health`, and streamed `/v1/completions`, as far as a benchmark asks.

Usage: mistralrs_serve.py GGUF PORT PLACES

A prompt is sent as a chat message, since only those are streamed; the model's template
adds a few tokens to it. RAYON_NUM_THREADS bounds the threads that compute.
"""

import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from mistralrs import ChatCompletionRequest, Runner, Which


def load(model, places):
    folder, file = os.path.split(os.path.abspath(model))
    which = Which.GGUF(quantized_model_id=folder, quantized_filename=file)
    return Runner(which=which, max_seqs=places)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"
    runner = None

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        request = ChatCompletionRequest(
            model="default",
            messages=[{"role": "user", "content": body["prompt"]}],
            max_tokens=body["max_tokens"],
            temperature=body["temperature"],
            stream=True,
        )
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.end_headers()
        usage = {"prompt_tokens": 0, "completion_tokens": 0}
        for part in self.runner.send_chat_completion_request(request):
            text = part.choices[0].delta.content if part.choices else None
            if getattr(part, "usage", None):
                usage["prompt_tokens"] = part.usage.prompt_tokens
                usage["completion_tokens"] = part.usage.completion_tokens
            if text:
                self.tell({"choices": [{"index": 0, "text": text}]})
        self.tell({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def tell(self, event):
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
        self.wfile.flush()


def main():
    model, port, places = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    begun = time.monotonic()
    Handler.runner = load(model, places)
    print(f"loaded in {time.monotonic() - begun:.1f} s", file=sys.stderr, flush=True)
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


main()
