"""A process group for one process, where an engine wants one and no launcher has said where its ranks meet."""

import os
import socket


def stand_alone_rendezvous() -> None:
    """Set the launcher's variables for one process, unless a launcher has."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
