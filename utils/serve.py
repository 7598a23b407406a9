"""Serve the live page on this machine: the network in a browser tab.

    python utils/serve.py
    python utils/serve.py --weights save/mine --port 8000

Serves static files at http://127.0.0.1:8080 and opens a browser, which processes the images; the
server receives none. The first call downloads ONNX Runtime Web (33 MB) and exports the released
weights, in about a minute. Needs `pip install ".[deploy]"`.
"""

import argparse
import sys
from pathlib import Path

from lednet.cli import common

ROOT = Path(__file__).resolve().parents[1]


def build_parser() -> argparse.ArgumentParser:
    parser = common.make_parser(__doc__)
    # fmt: off
    parser.add_argument("--weights", type=Path, metavar="PATH",
                        help="weights file, run folder or released name that the page offers first")
    parser.add_argument("--port", type=common.at_least(0, most=65535), default=8080,
                        help="port; 0 takes a free one")
    parser.add_argument("--browser", action=argparse.BooleanOptionalAction, default=True,
                        help="open a browser")
    # fmt: on
    return parser


if __name__ == "__main__":
    common.print_help_early(build_parser)
sys.path.insert(0, str(ROOT / "docs"))

import webbrowser
from collections.abc import Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import build_live

from lednet.errors import UserError, exit_on_user_error
from lednet.hub import list_pretrained

FOLDER = build_live.CACHE / "live"
"""Not the one that `make docs` publishes, as it may hold weights of --weights."""
HEADERS = {
    # The first two isolate the page, which WebAssembly threads need.
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # the browser asks whether a file has changed
}
"""Headers of every response."""


class Handler(SimpleHTTPRequestHandler):
    """Serves the files of a folder to pages of this machine, and lists no folders."""

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def send_head(self) -> Any:
        # Other pages can let a host name of theirs point to this machine (DNS rebinding).
        if self.headers.get("Host", "").partition(":")[0] not in ("127.0.0.1", "localhost"):
            return self.send_error(403)
        return super().send_head()

    def list_directory(self, path: Any) -> None:
        self.send_error(404)

    def log_message(self, *args: Any) -> None:
        pass


def make_server(folder: Path, port: int, handler: type[Handler] = Handler) -> ThreadingHTTPServer:
    """A server of the files in `folder` on 127.0.0.1.

    Raises:
        UserError: the port is taken.
    """
    try:
        return ThreadingHTTPServer(("127.0.0.1", port), partial(handler, directory=str(folder)))
    except OSError as error:
        raise UserError(f"cannot serve at port {port} ({error.strerror}): choose --port") from error


def main(argv: Sequence[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    with make_server(FOLDER, args.port) as server:
        build_live.build(FOLDER, [args.weights, *list_pretrained()] if args.weights else ())
        url = f"http://127.0.0.1:{server.server_port}"
        print(f"{url} shows the page; Ctrl-C ends it", flush=True)
        if args.browser:
            webbrowser.open(url)
        server.serve_forever()


if __name__ == "__main__":
    with exit_on_user_error():
        main()
