"""`d3pack view`: a pack in the browser."""

from __future__ import annotations

from dataclasses import dataclass

from d3pack.cli import _out
from d3pack.cli._fields import pack_argument
from d3pack.system import option


@dataclass(frozen=True, slots=True)
class View:
    """Open a page that verifies the pack and rebuilds its images in the browser.

    The page is served on this machine until Ctrl-C. It is built in a checkout of d3pack.

    Example: d3pack view cifar10.d3m
    """

    pack: str = pack_argument()
    open: bool = option(True, "Print the address of the page, open no browser.")
    port: int = option(0, "Port to listen on; 0 takes a free one.", ge=0, le=65535)

    def run(self) -> None:
        """Serve the page and the pack."""
        import webbrowser

        from d3pack.hub import local_path
        from d3pack.preview import viewer_address, viewer_directory, viewer_server

        file = local_path(self.pack)
        with viewer_server(file, viewer_directory(), self.port) as server:
            address = viewer_address(server, file)
            print(address, flush=True)
            _out.say("Ctrl-C ends the page")
            if self.open:
                webbrowser.open(address)
            try:
                server.serve_forever()
            except KeyboardInterrupt:
                _out.say("closed")
