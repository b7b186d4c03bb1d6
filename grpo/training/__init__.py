"""The GRPO training loop: rollouts, updates, and the weight sync from learner to engine."""
