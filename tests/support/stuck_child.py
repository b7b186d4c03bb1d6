"""An engine process that answers `start` and then freezes (SIGSTOP).

If GRPO_TEST_STUCK is "answer", it freezes in the middle of its next response. Otherwise it freezes
before it reads the next message.
"""

import os
import signal
import struct
import sys
from multiprocessing.connection import Connection

if __name__ == "__main__":
    pipe = Connection(int(sys.argv[1]))
    pipe.recv()
    pipe.send(("ok", {}))
    if os.environ.get("GRPO_TEST_STUCK") == "answer":
        pipe.recv()
        # The header announces 1,000 bytes (Connection's format); one of them follows.
        os.write(pipe.fileno(), struct.pack("!i", 1000) + b"x")
    os.kill(os.getpid(), signal.SIGSTOP)
