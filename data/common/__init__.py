"""Code shared by the problem sets: reading files, generating problems, and ordering them."""
