"""`python -m grpo`, which is equivalent to the command `grpo`."""

import sys
from pathlib import Path

# `python -m` puts the working directory first on sys.path. Move it to the end, so that a user's
# own data/ or rewards/ directory does not shadow the packages of the same name that grpo imports.
if sys.path[0] in ("", str(Path.cwd())):
    working_directory = sys.path.pop(0)
    sys.path.append(working_directory)

from grpo.cli import main

sys.exit(main())
