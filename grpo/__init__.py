"""grpo: reinforcement learning of reasoning with GRPO, on vLLM and DeepSpeed.

It runs on anything from a laptop's CPU to a cluster.
"""

__version__ = "0.1.0"
