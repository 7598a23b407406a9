"""Which requests a local server answers: those of its own page, and no others."""

import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SEALED = {
    # The browser itself asks nothing of other servers, and no other page can frame this one. Vue
    # compiles its templates in the browser, which takes 'unsafe-eval'.
    "content-security-policy": "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
"""Headers of every answer."""


class Guard:
    """Lets through what the page itself asks of its server, and nothing larger than an upload.

    Other pages in the same browser can send requests here too, even under a host name of theirs
    that they let point to this machine (DNS rebinding).

    Args:
        host: that the server is bound to.
        max_bytes: of a request.
    """

    def __init__(self, app: ASGIApp, host: str, max_bytes: int):
        self.app, self.host, self.max_bytes = app, host, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        if refusal := self._refusal(Headers(scope=scope)):
            status, sentence = refusal
            await PlainTextResponse(sentence + "\n", status)(scope, receive, send)
            return

        async def send_sealed(message: Message) -> None:
            if message["type"] == "http.response.start":
                sealed = [(key.encode(), value.encode()) for key, value in SEALED.items()]
                message["headers"] = [*message.get("headers", ()), *sealed]
            await send(message)

        await self.app(scope, receive, send_sealed)

    def _refusal(self, headers: Headers) -> tuple[int, str] | None:
        """Status and sentence for a request that is not let through."""
        host = headers.get("host", "")
        if not is_own_name(host, self.host):
            return 403, "This server is not known by that name."
        if headers.get("origin", f"http://{host}") != f"http://{host}":
            return 403, "Other pages have no access."
        from_elsewhere = headers.get("sec-fetch-site") in ("cross-site", "same-site")
        if from_elsewhere and headers.get("sec-fetch-mode") != "navigate":
            return 403, "Other pages have no access."
        if "transfer-encoding" in headers:
            return 411, "Say the length of what you send."
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.max_bytes:
            return 413, "That is larger than the limit."
        return None


def is_own_name(header: str, bound: str) -> bool:
    """Whether a request's host names a server bound to the host `bound`.

    A rebound name is a name: so of a server that is bound to every address any address is taken.
    """
    try:
        name = urlsplit(f"//{header}").hostname or ""
        if name in ("localhost", bound.lower()):
            return True
        address = ipaddress.ip_address(name)
    except ValueError:
        return False
    return address.is_loopback or bound in ("0.0.0.0", "::")
