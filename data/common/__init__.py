"""What problem sets share: reading files, drawing by formula, and the order of problems."""
