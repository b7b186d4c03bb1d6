"""vLLM servers over HTTP, as one engine.

pool              `ServerPool`, the engine: composes the files below
server            one server: its URL, its process, its state
client            one HTTP request to one server, with typed errors
scheduler         the least loaded server for a request; retries
availability      which servers a rank may ask
supervisor        rank 0 starts, watches and restarts servers
weight_updates    new weights for one server, for all of them, for one that comes back
state, loop_thread, command_line
guard, plugin     what runs inside a server
__main__          a server for `engine.servers.urls` (launch/server.sh)
"""
