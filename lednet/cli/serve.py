"""The command `lednet serve`: serve the live page on this machine."""

import webbrowser
from collections.abc import Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from lednet.cli import live_page, parsers
from lednet.errors import UserError
from lednet.hub import list_pretrained
from lednet.inference.engine_cache import cache_folder

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
    args = parsers.serve().parse_args(argv)
    folder = args.out or cache_folder() / "live"
    weights = [args.weights, *list_pretrained()] if args.weights else ()
    if args.build_only:
        live_page.build(folder, weights)
        size = sum(file.stat().st_size for file in folder.rglob("*"))
        print(f"{folder}: {size / 1e6:.0f} MB")
        return
    with make_server(folder, args.port) as server:
        live_page.build(folder, weights)
        url = f"http://127.0.0.1:{server.server_port}"
        print(f"{url} shows the page; Ctrl-C ends it", flush=True)
        if args.browser:
            webbrowser.open(url)
        server.serve_forever()
