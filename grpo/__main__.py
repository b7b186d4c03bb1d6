"""`python -m grpo`, the same as `grpo`."""

import sys
from pathlib import Path

if sys.path[0] in ("", str(Path.cwd())):
    # a user's own data/ or rewards/ in the working directory does not shadow ours
    sys.path.append(sys.path.pop(0))

from grpo.cli import main

sys.exit(main())
