"""Training: turns samples into new weights.

Contains advantages, batches, models, the policy, the objective and the learners.
"""
