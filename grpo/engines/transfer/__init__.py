"""How weights travel into an engine, and how their arrival is checked.

interface                          what sender and receiver expect of each other
choose                             which transport a run uses
memory, file, ipc, nccl            one transport each, the sending side
receivers, receiver_registration   the receiving side, in vLLM's processes
checksums, layout                  the tensors with their checksums, in memory or in a file
"""
