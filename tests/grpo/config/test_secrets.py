"""A secret in a config is refused, and not repeated in the message; names of variables are not."""

import pytest

from grpo import config as configs
from grpo.types import UserError

MINIMAL = {
    "run_dir": "runs/x",
    "model": {"path": "tiny-qwen2"},
    "data": {"name": "arithmetic"},
    "train": {"rollouts": 3},
}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"rewards": {"mine:f": {"options": {"api_key": "hunter2"}}}},
            r"rewards\.mine:f\.options\.api_key: the value is a secret.*api_key_env: MY_KEY",
        ),
        ({"rewards": {"mine:f": {"options": {"judge_password": "hunter2"}}}}, "is a secret"),
        (
            {"rewards": {"mine:f": {"options": {"url": "https://me:hunter2@host/v1"}}}},
            r"options\.url: the URL contains a password or a key",
        ),
        (
            {"engine": {"servers": {"urls": [" http://me:hunter2@node:8000"]}}},
            r"urls\.0: the URL contains",
        ),
        (
            {"data": {"name": "jsonl", "path": "https://host/a?x=1&token=hunter2"}},
            "data.path: the URL",
        ),
    ],
)
def test_a_secret_is_refused_and_not_repeated(section, message):
    with pytest.raises(UserError, match=message) as error_info:
        configs.parse(MINIMAL | section)
    assert "hunter2" not in str(error_info.value)


def test_names_of_variables_stop_tokens_and_plain_urls_are_accepted():
    options = {
        "api_key_env": "MY_KEY",
        "token": "</answer>",
        "max_tokens": 5,
        "url": "http://host:8000/v1?page=2",
        "password": None,
        "repository": "git+ssh://git@host/x",
    }
    config = configs.parse(MINIMAL | {"rewards": {"mine:f": {"options": options}}})
    assert config.rewards["mine:f"].options == options


@pytest.mark.parametrize(
    "key", ["api_keys", "secret_key", "aws_secret_access_key", "bearer_token", "x-api-key"]
)
@pytest.mark.parametrize("value", ["hunter2", 1234, ["hunter2"]])
def test_other_spellings_and_types_are_refused(key, value):
    options = {"headers": {key: value}}
    with pytest.raises(UserError, match=f"headers.{key}: the value is a secret"):
        configs.parse(MINIMAL | {"rewards": {"mine:f": {"options": options}}})
