"""An engine process that answers `start` and then stops: it takes no message and ends none.

With GRPO_TEST_STUCK=answer it stops in the middle of its next answer instead.
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
        os.write(pipe.fileno(), struct.pack("!i", 1000) + b"x")
    os.kill(os.getpid(), signal.SIGSTOP)
