"""vLLM as a child process: found, started with the plugin and the adapters, and ended with the server."""
