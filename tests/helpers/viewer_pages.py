"""Pages of the viewer, served to a browser."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from d3pack.preview import viewer_address, viewer_directory, viewer_server


@contextmanager
def served(pack: Path) -> Iterator[str]:
    """Serve a pack and give the address of its page."""
    with viewer_server(pack, viewer_directory()) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield viewer_address(server, pack)
        finally:
            server.shutdown()
            thread.join()
