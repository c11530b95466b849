"""Serving the page to this machine alone, and to no other site that is open in its browser.

A page of another site can make a browser send requests to 127.0.0.1, under its own name as Origin,
or under a name of its own that it lets point to 127.0.0.1 (DNS rebinding), which is then the Host.
"""

import socket

from replknet_paddle.runtime.errors import InputError

ADDRESS = "127.0.0.1"


def reserve_port(port: int) -> socket.socket:
    """A socket that listens on a port of this machine.

    Raises:
        InputError: the port is in use, or may not be used.
    """
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((ADDRESS, port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise InputError(
            f"port {port} of {ADDRESS} is not available ({error.strerror}): another program, "
            "perhaps another page, uses it; give another one by --port"
        ) from None
    return listener


class ThisMachineOnly:
    """An ASGI application that answers 403 to requests under a foreign Host or Origin.

    Args:
        app: the application behind it.
        port: that it is served on.
    """

    def __init__(self, app, port: int):
        self.app = app
        self.hosts = {f"{name}:{port}".encode() for name in (ADDRESS, "localhost")}
        self.origins = {b"http://" + host for host in self.hosts}

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan" or self.is_own(scope["headers"]):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            text = b"allowed: requests of this page, under its own address\n"
            headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(text))]
            await send({"type": "http.response.start", "status": 403, "headers": headers})
            await send({"type": "http.response.body", "body": text})

    def is_own(self, headers: list[tuple[bytes, bytes]]) -> bool:
        """Whether there is one Host, and no Origin or one, and these are this page's."""
        hosts = [value.lower() for name, value in headers if name.lower() == b"host"]
        origins = [value.lower() for name, value in headers if name.lower() == b"origin"]
        return (
            len(hosts) == 1
            and hosts[0] in self.hosts
            and (not origins or (len(origins) == 1 and origins[0] in self.origins))
        )


def serve(app, listener: socket.socket) -> None:
    """Serve an ASGI application on a socket of `reserve_port` until Ctrl-C or SIGTERM."""
    import uvicorn

    port = listener.getsockname()[1]
    config = uvicorn.Config(
        ThisMachineOnly(app, port), log_level="error", access_log=False, server_header=False
    )
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None  # the command has its own

    print(f"http://{ADDRESS}:{port}  (Ctrl-C ends it)", flush=True)
    server.run(sockets=[listener])
