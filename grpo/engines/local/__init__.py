"""vLLM in one child process per rank.

engine            this side: starts the child, asks it, notices when it dies
weight_receiver   the child as the receiver of a weight sender
pipe              messages with time limits
child             the other side, with vLLM
"""
