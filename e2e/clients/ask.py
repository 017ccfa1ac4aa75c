"""Asks one question of an OpenAI-compatible server and prints the answer as it streams.

Usage: ask.py BASE_URL MODEL QUESTION [MAX_TOKENS]

Needs nothing but Python's standard library. Exits 1 with the server's message when
the server answers with an error.
"""

import json
import sys
import time
import urllib.error
import urllib.request


def main() -> int:
    base_url, model, question = sys.argv[1:4]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": int(sys.argv[4]) if len(sys.argv) > 4 else 160,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    request = urllib.request.Request(
        f"{base_url}/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    begun, first, usage = time.monotonic(), None, None
    try:
        with urllib.request.urlopen(request, timeout=120) as response:
            for line in response:
                if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                    continue
                event = json.loads(line[len(b"data: ") :])
                if "error" in event:
                    print(f"\n{event['error']['message']}", file=sys.stderr)
                    return 1
                usage = event.get("usage") or usage
                for choice in event["choices"]:
                    piece = choice["delta"].get("content") or ""
                    if piece and first is None:
                        first = time.monotonic()
                    print(piece, end="", flush=True)
    except urllib.error.HTTPError as error:
        print(f"HTTP {error.code}: {error.read().decode(errors='replace')}", file=sys.stderr)
        return 1
    except urllib.error.URLError as error:
        print(f"{base_url} does not answer: {error.reason}", file=sys.stderr)
        return 1
    print()
    if first is None:
        print("the answer was empty", file=sys.stderr)
        return 1
    if usage:
        tokens = usage["completion_tokens"]
        seconds = max(time.monotonic() - first, 1e-9)
        print(
            f"({tokens} tokens; first after {first - begun:.2f} s, then {(tokens - 1) / seconds:.0f} a second)",
            file=sys.stderr,
        )
    return 0


sys.exit(main())
