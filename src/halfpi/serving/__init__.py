"""Policies behind openpi's websocket protocol: `halfpi.serving.server.run_server` runs one."""
