"""The circle of rollouts and updates, and the weights' way back into the engine."""
