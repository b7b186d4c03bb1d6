"""Transfers weights to an engine and verifies their arrival.

interface                          protocols of the sending and the receiving side
choose                             selects the transport of a run
memory, file, ipc, nccl            one transport each, the sending side
receivers, receiver_registration   the receiving side, in vLLM's processes
checksums, layout                  the tensors with their checksums, in memory or in a file
"""
