"""Turns problems into scored groups: prompts, sampling, rewards, selection.

Does not import torch.
"""
