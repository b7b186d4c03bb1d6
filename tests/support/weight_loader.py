"""A stand-in for the model of a vLLM weight-transfer engine."""

import torch


class Loader(torch.nn.Module):
    """A model whose only function is to load weights.

    Attributes:
        loaded: The weights that have arrived, by name.
    """

    def __init__(self, names):
        """`names`: names of the model's parameters; each parameter is a single zero."""
        super().__init__()
        self.loaded = {}
        for name in names:
            self.register_parameter(name, torch.nn.Parameter(torch.zeros(1)))

    def load_weights(self, weights):
        """Stores copies of `(name, tensor)` pairs and returns the names, as vLLM's models do."""
        arrived = {name: tensor.clone() for name, tensor in weights}
        self.loaded.update(arrived)
        return arrived.keys()
