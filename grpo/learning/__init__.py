"""From samples to new weights: advantages, batches, the policy, and DeepSpeed's learner."""
