"""Run inside a pod with `python -c SCRIPT URL CALLERS`: asks the service over and over until stdin ends.

Half of the callers open a connection for each request. Half keep theirs, and ask again, as such callers must, when it
was closed before they were answered, or with 503 and `Connection: close`. The load has bounds: a pause after each
answer, and an end to the number of requests. What came of them is printed as JSON.
"""

import collections
import http.client
import json
import sys
import threading
import time
import urllib.parse

PAUSE_SECONDS = 0.05
MOST_REQUESTS = 2000
POST = {"subreddit": "pets", "title": "my cat", "body": "i lost my cat on saturday. now i feel guilty."}
BODY = json.dumps({"posts": [POST], "max_new_tokens": 8})


class Caller(threading.Thread):
    """One caller; counts what its requests ended with."""

    def __init__(self, host: str, port: int, *, keeps: bool, ended: threading.Event) -> None:
        super().__init__(daemon=True)
        self.connection = http.client.HTTPConnection(host, port, timeout=60)
        self.keeps, self.ended = keeps, ended
        self.counts: collections.Counter[str] = collections.Counter()

    def run(self) -> None:
        """Ask until told to stop."""
        for _ in range(MOST_REQUESTS):
            if self.ended.is_set():
                return
            kept = self.connection.sock is not None
            outcome, closed = self.ask()
            if kept and closed:
                self.counts["asked again"] += 1
                outcome, _ = self.ask()
            self.counts[outcome] += 1
            if not self.keeps:
                self.connection.close()
            time.sleep(PAUSE_SECONDS)

    def ask(self) -> tuple[str, bool]:
        """What a request ended with, and whether the other side closed the connection instead of doing the work."""
        try:
            self.connection.request("POST", "/summarize", BODY, {"Content-Type": "application/json"})
            answer = self.connection.getresponse()
            text = answer.read()
        except (OSError, http.client.HTTPException) as error:
            self.connection.close()  # opens itself anew
            return f"{type(error).__name__}: {error}", isinstance(error, ConnectionError)
        if answer.status == 200 and json.loads(text)["results"]:
            return "good", False
        return f"HTTP {answer.status}: {text[:200].decode()}", answer.status == 503 and answer.will_close


def main() -> None:
    """Call, from several threads, until stdin ends."""
    address, ended = urllib.parse.urlsplit(sys.argv[1]), threading.Event()
    callers = [
        Caller(address.hostname or "", address.port or 80, keeps=bool(number % 2), ended=ended)
        for number in range(int(sys.argv[2]))
    ]
    for caller in callers:
        caller.start()
    print("calling", flush=True)
    sys.stdin.read()
    ended.set()
    counts = {"fresh": collections.Counter[str](), "kept": collections.Counter[str]()}
    for caller in callers:
        caller.join()
        counts["kept" if caller.keeps else "fresh"].update(caller.counts)
    print(json.dumps(counts))


if __name__ == "__main__":
    main()
