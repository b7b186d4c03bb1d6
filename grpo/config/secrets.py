"""Refuses configs that contain a secret.

A config is written to the run directory, the report and the trackers. A secret belongs into an
environment variable, whose name a config may contain: `api_key_env: MY_KEY`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

# The end of a key whose value is a secret: api_key, judge-password, hf_token. The value of `token`
# alone is often a text, such as a stop token.
_SECRET_KEY = re.compile(
    r"(^|[_-])(api[_-]?keys?|(secret|private|access)[_-]?keys?|passwords?|passwd|secrets?|"
    r"(auth|access|api|bearer|hf)[_-]tokens?|authorization)$",
    re.I,
)
_SECRET_IN_URL = re.compile(
    r"^\s*[a-z][a-z0-9+.-]*://("
    r"[^/?#@:]*:[^/?#@]*@"  # user:password@
    r"|[^#]*[?&](api_?key|key|token|access_token|password|secret|sig|signature)=.)",
    re.I,
)


def find_secrets(tree: Any, key: str = "") -> Iterator[str]:
    """Yields the keys of a config tree whose values are secrets, and what to do about each.

    Example:
        `{"endpoint": {"url": "http://me:1234@host/v1"}}` yields "endpoint.url: the URL contains a
        password or a key. ...". The message does not contain the value.
    """
    remedy = (
        "A config is written to the run directory and to trackers: set an environment variable and "
        "name it in the config, e.g. api_key_env: MY_KEY"
    )
    if tree and _SECRET_KEY.search(key.rpartition(".")[2]):
        yield f"{key}: the value is a secret. {remedy}"
    elif isinstance(tree, dict):
        for name, value in tree.items():
            yield from find_secrets(value, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from find_secrets(value, f"{key}.{index}")
    elif isinstance(tree, str) and _SECRET_IN_URL.search(tree):
        yield f"{key}: the URL contains a password or a key. {remedy}"
