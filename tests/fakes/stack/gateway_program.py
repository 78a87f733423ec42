"""A stand-in for the gateway: answers /readyz on the inherited socket, and says who answered."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer


class Handler(BaseHTTPRequestHandler):
    catalogue = ""

    def do_GET(self) -> None:
        with open(self.catalogue) as file:
            known = [model["id"] for model in json.load(file)["models"]]
        found = "model=" not in self.path or self.path.rsplit("=", 1)[1] in known
        body = json.dumps({"pid": os.getpid(), "models": known}).encode()
        self.send_response(200 if found else 404)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("fd", "catalogue", "gateway-id"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--prometheus-dir")
    arguments = parser.parse_args()
    _ = os.environ["REDIS_URL"]  # as the real one: it may hold a password, so it is on no command line
    Handler.catalogue = arguments.catalogue
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    server = HTTPServer(("127.0.0.1", 0), Handler, bind_and_activate=False)
    server.socket.close()
    server.socket = socket.socket(fileno=int(arguments.fd))
    server.socket.setblocking(True)
    server.serve_forever()


if __name__ == "__main__":
    main()
