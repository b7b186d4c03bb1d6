"""grpo: reinforcement learning of reasoning models with GRPO, on vLLM and DeepSpeed.

The program runs on a laptop's CPU, on one GPU and on a cluster.
"""

__version__ = "0.1.0"
