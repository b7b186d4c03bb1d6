"""A user's own reward, as it could lie in a working directory: the share of digits among twelve characters."""


def share(completion, problem):
    return sum(char.isdigit() for char in completion.text) / 12
