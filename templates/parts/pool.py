SETTINGS: Settings = {
    "POOL_SIZE": number_setting(8),
    "POOL_TIMEOUT": number_setting(5.0),  # seconds
    "POOL_RECYCLE": number_setting(1800),  # seconds
    "POOL_RESET": bool_setting(),
}

PING_AFTER_IDLE = 1.0  # seconds since a connection was returned
PING_TIMEOUT = 1.0  # seconds


# The hooks of the process must not keep the pools of former applications.
pools: WeakSet["Pool"] = WeakSet()


@atexit.register
def _close_all() -> None:
    for pool in list(pools):
        pool.close()


def _reset_all() -> None:
    for pool in list(pools):
        pool.reset_after_fork()


if hasattr(os, "register_at_fork"):  # Windows has no fork.
    os.register_at_fork(after_in_child=_reset_all)


class FairSemaphore:
    """Let `size` threads in at a time, first come, first served.

    `threading.Semaphore` lets a new thread overtake those that wait.
    """

    def __init__(self, size: int) -> None:
        self.size = self.available = size
        self.waiting: deque[object] = deque()
        self._changed = Condition()

    def acquire(self, timeout: float) -> None:
        """Take a slot. Raises `DatabaseUnavailable` after `timeout` seconds."""
        with self._changed:
            waiter = object()
            self.waiting.append(waiter)
            try:
                acquired = self._changed.wait_for(
                    lambda: self.available > 0 and self.waiting[0] is waiter, timeout
                )
                self.available -= acquired
            finally:
                self.waiting.remove(waiter)
                self._changed.notify_all()
        if not acquired:
            message = f"No connection became available in POOL_TIMEOUT ({timeout:g} s)"
            hint = f"raise POOL_SIZE ({self.size}) or return connections sooner."
            raise DatabaseUnavailable(f"{message}: {hint}")

    def release(self) -> None:
        """Return a slot."""
        with self._changed:
            self.available += 1
            self._changed.notify_all()

    def stats(self) -> dict[str, int]:
        """Count the slots, those in use, and the threads that wait for one."""
        in_use, waiting = self.size - self.available, len(self.waiting)
        return {"size": self.size, "in_use": in_use, "waiting": waiting}


def responds(conn: Connection, query: str = "") -> bool:
    """Return whether a connection is open, and executes the query if there is one."""
    try:
        conn.poll()  # Read the server's messages, without waiting for any.
        # A server that closes a connection sends a notice first.
        if query or conn.notices:
            _execute_with_timeout(conn, query or "SELECT 1")
    except (psycopg2.Error, RuntimeError):  # Python starts no thread while it exits.
        return False
    return True


def is_usable(conn: Connection) -> bool:
    """Return whether a connection is open. Ping it if it was idle for long."""
    idle = monotonic() - conn.returned
    return responds(conn, "SELECT 1" if idle > PING_AFTER_IDLE else "")


def _execute_with_timeout(conn: Connection, query: str) -> None:
    with fromfd(conn.fileno(), AF_INET, SOCK_STREAM) as duplicate:
        # In a network that drops all packets, the query would wait for hours.
        timer = Timer(PING_TIMEOUT, _shut_down, [duplicate])
        timer.start()
        try:
            conn.cursor().execute(query)
        finally:
            timer.cancel()
            timer.join()


def _shut_down(duplicate: socket) -> None:
    with suppress(OSError):  # The connection may have died meanwhile.
        duplicate.shutdown(SHUT_RDWR)
