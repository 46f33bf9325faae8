"""For every test."""

import signal

# A shell that starts the tests in the background has them ignore Ctrl-C, and their children after them; tests of Ctrl-C need it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
