"""Asks an OpenAI-compatible server for one long answer after the other, as streams.

Usage: streams.py BASE_URL MODEL TOKENS CLIENTS

Each client asks for TOKENS tokens, again and again, until standard input ends; answers
that are under way then are read to their end. Every second client keeps its connection
open between answers, as pools of connections do; the others open one for each answer.
Prints a line of JSON when every client has read the beginning of an answer, and one at
the end: how many answers were whole, and what was wrong with the others. Needs nothing
but Python's standard library.
"""

import http.client
import json
import sys
import threading
import urllib.parse

DEADLINE_S = 120
QUESTION = "Tell me a very long story about the sea and a lighthouse."


class Client(threading.Thread):
    def __init__(self, url: str, model: str, tokens: int, number: int, stop: threading.Event):
        super().__init__(daemon=True)
        parts = urllib.parse.urlsplit(url)
        self.host, self.path = parts.netloc, f"{parts.path}/chat/completions"
        self.tokens, self.stop, self.keeps = tokens, stop, number % 2 == 1
        self.begun = threading.Event()
        self.answers, self.wrong = 0, []
        self.body = json.dumps({
            "model": model,
            "messages": [{"role": "user", "content": f"{QUESTION} ({number})"}],
            "max_tokens": tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        })

    def run(self) -> None:
        connection = None
        while not self.stop.is_set():
            connection = connection or http.client.HTTPConnection(self.host, timeout=DEADLINE_S)
            try:
                wrong = self.ask(connection)
            except (OSError, http.client.HTTPException, ValueError) as error:
                wrong = repr(error)
            if wrong:
                self.wrong.append(f"answer {self.answers + 1}, connection kept {self.keeps}: {wrong}")
                break
            self.answers += 1
            if not self.keeps:
                connection.close()
                connection = None
        self.begun.set()

    def ask(self, connection: http.client.HTTPConnection) -> str | None:
        """What was wrong with one answer."""
        headers = {"Content-Type": "application/json"}
        connection.request("POST", self.path, self.body, headers)
        response = connection.getresponse()
        if response.status != 200:
            return f"HTTP {response.status}: {response.read().decode(errors='replace')}"
        reason, usage, done = None, None, False
        for line in response:
            if not line.startswith(b"data: "):
                continue
            if done:
                return f"{line!r} after [DONE]"
            if line.strip() == b"data: [DONE]":
                done = True
                continue
            event = json.loads(line[len(b"data: ") :])
            if "error" in event:
                return event["error"]["message"]
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                reason = choice["finish_reason"] or reason
                if choice["delta"].get("content"):
                    self.begun.set()
        tokens = (usage or {}).get("completion_tokens")
        if (reason, tokens, done) != ("length", self.tokens, True):
            return f"it ended with {reason}, {tokens} tokens, [DONE] {done}"
        return None


def main() -> int:
    url, model, tokens, count = sys.argv[1:5]
    stop = threading.Event()
    clients = [Client(url, model, int(tokens), number, stop) for number in range(int(count))]
    for client in clients:
        client.start()
    for client in clients:
        client.begun.wait()
    print(json.dumps({"begun": len(clients)}), flush=True)
    sys.stdin.read()
    stop.set()
    for client in clients:
        client.join()
    wrong = [text for client in clients for text in client.wrong]
    print(json.dumps({"answers": sum(client.answers for client in clients), "wrong": wrong}))
    return 1 if wrong else 0


sys.exit(main())
