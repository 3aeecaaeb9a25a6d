"""Counts in several threads and serves the counts: state to look for after a move.

GET / answers {"hits": requests so far, "ticks": [one count for each worker]}.
"""

import http.server
import json
import os
import threading
import time

WORKERS = 4
ticks = [0] * WORKERS
hits = 0
lock = threading.Lock()


def count(worker):
    while True:
        ticks[worker] += 1
        time.sleep(0.01)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        global hits
        with lock:
            hits += 1
            body = json.dumps({"hits": hits, "ticks": ticks, "pid": os.getpid()}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format, *args):
        pass


for worker in range(WORKERS):
    threading.Thread(target=count, args=(worker,), daemon=True).start()
http.server.ThreadingHTTPServer(("", int(os.environ.get("PORT", "8080"))), Handler).serve_forever()
