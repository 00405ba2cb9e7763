"""Programs that look at runs and recipes: compare, plan, chain, curves, overoptimise."""

import signal
import sys

# Started with -m, a tool that is still importing torch ends on Ctrl-C without a traceback; from
# `guard` on it is told.
if sys.argv[0] == "-m" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
