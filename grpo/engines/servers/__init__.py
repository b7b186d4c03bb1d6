"""The engine `ServerPool`: vLLM servers over HTTP, used as one engine.

pool              `ServerPool`; composes the modules below
server            one server: URL, process and state
state             state that the modules of a pool share
client            HTTP requests to one server, with typed errors
scheduler         selects a server for each request; retries failed requests
availability      the servers that a rank can send requests to
supervisor        monitors, restarts and updates the servers; runs on rank 0
weight_updates    the weight update of one server, and of all servers
loop_thread       an asyncio event loop in a background thread
command_line      command line, environment, CPU cores and token of a server process
guard             checks the token of each request; runs inside a server
plugin            vLLM plugin; runs inside a server
__main__          starts one server for `engine.servers.urls` (launch/server.sh)
"""
