"""From problems to scored groups: values without torch."""
