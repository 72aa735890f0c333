"""A network between an application and its PostgreSQL, with what goes wrong in one."""

import socket
import struct
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from selectors import EVENT_READ, DefaultSelector
from threading import Thread


class Proxy:
    """Pass on to a server what comes to `port`, until told otherwise.

    `messages` are the types of those that clients sent once they were connected, such
    as `Q` for a query and `X` for an orderly end. `refuse_startup` gets the parameters
    of each client, and returns the message to reject it with, or an empty string.
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
        """Accept connections again, and pass on what comes in them."""
        self._order(self._listen)

    def refuse(self) -> None:
        """Drop all connections, and accept none."""
        self._order(self._close)
        self.reset()

    def end(self) -> None:
        """Drop all connections, and accept none any more."""
        self.refuse()
        self.running = False
        self.thread.join()

    def reset(self) -> None:
        """Drop all connections, with what is under way in them."""
        self._order(self._drop_all)

    def fall_silent(self) -> None:
        """Accept connections and all that comes in them, and pass nothing on."""
        self.silent = True

    def speak(self) -> None:
        """Pass on again what comes, in new connections."""
        self.reset()
        self.silent = False

    def _order(self, order: Callable[[], None]) -> None:
        done: Future[None] = Future()
        self.orders.put((order, done))
        done.result(60)

    def _run(self) -> None:
        while self.running:
            for key, _ in self.selector.select(0.01):
                if key.fileobj.fileno() >= 0:  # or the one before has ended it
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
        if data[4:8] != struct.pack("!I", 3 << 16):  # the version of the protocol
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
            # Without the good-bye of TCP.
            linger = struct.pack("ii", 1, 0)
            side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        while self.others:
            self._end(next(iter(self.others)))
