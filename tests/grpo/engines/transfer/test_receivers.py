"""The receiving engines inside vLLM."""

import torch


def test_only_models_that_use_their_weights_unprocessed_are_loaded_in_place():
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
    from vllm.v1.attention.backend import AttentionImplBase

    from grpo.engines.transfer.receivers import loads_in_place

    class Layer(torch.nn.Module):
        def __init__(self, quant_method):
            super().__init__()
            self.quant_method = quant_method

    class PackedMethod(UnquantizedLinearMethod):
        """Packs the weight in `process_weights_after_loading`."""

    class LatentAttention(torch.nn.Module):
        def process_weights_after_loading(self, dtype):
            """Derives matrices from a weight."""

    class PlainImplementation(AttentionImplBase):
        """Does nothing after loading."""

    class DerivingImplementation(AttentionImplBase):
        def process_weights_after_loading(self, act_dtype):
            """Derives attention sinks from a weight."""

    def attention(implementation_class):
        layer = Attention.__new__(Attention)
        torch.nn.Module.__init__(layer)
        layer.impl = object.__new__(implementation_class)
        return layer

    unprocessed_layers = [
        Layer(UnquantizedLinearMethod()),
        Layer(UnquantizedEmbeddingMethod()),
        Layer(None),
        torch.nn.LayerNorm(4),
        attention(PlainImplementation),
    ]
    assert loads_in_place(torch.nn.Sequential(*unprocessed_layers))
    for processed_layer in (
        Layer(PackedMethod()),
        LatentAttention(),
        attention(DerivingImplementation),
    ):
        nested = torch.nn.Sequential(processed_layer)
        assert not loads_in_place(torch.nn.Sequential(*unprocessed_layers, nested))
