"""A server that tells its clients that it stops, where uvicorn's would cut them off and log their tracebacks."""

from __future__ import annotations

import asyncio
import socket

import uvicorn

from nanopd_lab.cluster.actions import ClusterDownError

GRACE_S = 5.0
ENDING_S = 5  # for what has been told, before uvicorn cuts it off after all


class Server(uvicorn.Server):
    """Serves an app of `create_app`.

    Args:
        grace_s: for requests under way to end by themselves once the server stops; then they fail
    """

    def __init__(self, config: uvicorn.Config, grace_s: float = GRACE_S) -> None:
        config.timeout_graceful_shutdown = ENDING_S + round(grace_s)
        super().__init__(config)
        self.grace_s = grace_s

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn's."""
        bridge = self.config.app.state.bridge  # type: ignore[union-attr]
        error = ClusterDownError("the server is stopping; ask again when it is back")
        failing = asyncio.get_running_loop().call_later(self.grace_s, bridge.fail, error)
        try:
            await super().shutdown(sockets)
        finally:
            failing.cancel()
