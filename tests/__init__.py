"""Tests of the template, and of the projects that it generates."""

import signal

# The processes of the tests must react to Ctrl-C. They inherit that it is ignored where
# a shell starts the tests in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):  # `nohup` ignores it; a handler is not inherited.
    signal.signal(signal.SIGHUP, lambda *_: None)
