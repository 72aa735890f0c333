"""A proxy between an application and PostgreSQL that imitates network faults."""

import socket
import struct
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from selectors import EVENT_READ, DefaultSelector
from threading import Thread


class Proxy:
    """Forward connections from `port` to a server.

    `messages` has the type of each message that a connected client sent, such as `Q`
    for a query and `X` for termination. `refuse_startup` gets the startup parameters of
    each client. It returns an error message to reject the client, or an empty string.
    """

    def __init__(
        self,
        host: str,
        port: int,
        refuse_startup: Callable[[dict[str, str]], str] = lambda parameters: "",
    ) -> None:
        self.server = (host, port)
        self.refuse_startup = refuse_startup
        self.port = 0
        self.messages: list[str] = []
        self.silent = False
        self.others: dict[socket.socket, socket.socket] = {}
        self.clients: set[socket.socket] = set()
        self.orders: SimpleQueue[tuple[Callable[[], None], Future[None]]] = (
            SimpleQueue()
        )
        self.selector = DefaultSelector()
        self._listen()
        self.running = True
        self.thread = Thread(target=self._run, daemon=True)
        self.thread.start()

    def accept(self) -> None:
        """Accept and forward connections again."""
        self._order(self._listen)

    def refuse(self) -> None:
        """Reset all connections, and refuse new ones."""
        self._order(self._close)
        self.reset()

    def end(self) -> None:
        """Reset all connections, and stop for good."""
        self.refuse()
        self.running = False
        self.thread.join()

    def reset(self) -> None:
        """Reset all connections, and lose the data in transit."""
        self._order(self._drop_all)

    def fall_silent(self) -> None:
        """Accept connections and data, but forward nothing."""
        self.silent = True

    def speak(self) -> None:
        """Reset all connections, and forward new ones again."""
        self.reset()
        self.silent = False

    def _order(self, order: Callable[[], None]) -> None:
        done: Future[None] = Future()
        self.orders.put((order, done))
        done.result(60)

    def _run(self) -> None:
        while self.running:
            for key, _ in self.selector.select(0.01):
                # Handling the previous event may have closed this socket.
                if key.fileobj.fileno() >= 0:
                    key.data(key.fileobj)
            try:
                order, done = self.orders.get_nowait()
            except Empty:
                continue
            order()
            done.set_result(None)

    def _listen(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", self.port))
        self.port = self.listener.getsockname()[1]
        self.selector.register(self.listener, EVENT_READ, self._accept)

    def _close(self) -> None:
        self.selector.unregister(self.listener)
        self.listener.close()

    def _accept(self, listener: socket.socket) -> None:
        client, _ = listener.accept()
        try:
            server = socket.create_connection(self.server)
        except ConnectionRefusedError:
            return client.close()
        self.clients.add(client)
        for one, other in ((client, server), (server, client)):
            self.others[one] = other
            self.selector.register(one, EVENT_READ, self._pass_on)

    def _pass_on(self, source: socket.socket) -> None:
        try:
            data = source.recv(65536)
            if source in self.clients:
                self._note(data)
                if message := self._refusal(data):
                    source.sendall(message)
                    data = b""
            if data and not self.silent:
                self.others[source].sendall(data)
        except OSError:
            data = b""
        if not data:
            self._end(source)

    def _refusal(self, data: bytes) -> bytes:
        if data[4:8] != struct.pack("!I", 3 << 16):  # protocol version 3.0
            return b""
        *words, _, _ = data[8:].decode().split("\0")
        message = self.refuse_startup(dict(zip(words[::2], words[1::2], strict=True)))
        if not message:
            return b""
        fields = f"SFATAL\0VFATAL\0C08P01\0M{message}\0\0".encode()
        return b"E" + struct.pack("!I", 4 + len(fields)) + fields

    def _note(self, data: bytes) -> None:
        while len(data) >= 5 and chr(data[0]).isalpha():
            (length,) = struct.unpack("!I", data[1:5])
            self.messages.append(chr(data[0]))
            data = data[1 + length :]

    def _end(self, source: socket.socket) -> None:
        for side in (source, self.others[source]):
            self.selector.unregister(side)
            self.others.pop(side)
            self.clients.discard(side)
            side.close()

    def _drop_all(self) -> None:
        for side in list(self.others):
            # With this option, close() sends a reset.
            linger = struct.pack("ii", 1, 0)
            side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        while self.others:
            self._end(next(iter(self.others)))
