"""vLLM in one child process per rank."""
