"""vLLM in one child process per rank.

engine            the parent's side: starts the child, calls it and detects its end
weight_receiver   the child as the receiver of a weight sender
pipe              messages with time limits
child             the child's side, which runs vLLM
"""
