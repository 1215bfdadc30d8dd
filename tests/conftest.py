"""What holds for every run of the tests, however it was started."""

from __future__ import annotations

import signal

# A shell starts what runs in the background with SIGINT ignored, and every program we start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
