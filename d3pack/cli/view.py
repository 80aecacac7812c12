"""`d3pack view`: a pack in the browser."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from d3pack.cli import _out
from d3pack.cli._fields import Format, format_option, pack_argument
from d3pack.system import option


@dataclass(frozen=True, slots=True)
class View:
    """Open a page that verifies the pack and rebuilds its images in the browser.

    The page is served on this machine until Ctrl-C. It is built in a checkout of d3pack.

    Example: d3pack view cifar10.d3m
    """

    pack: str = pack_argument()
    no_open: bool = option(False, "Print the address of the page, open no browser.")
    port: int = option(0, "Port to listen on; 0 takes a free one.", ge=0, le=65535)
    format: Format = format_option()

    def run(self) -> None:
        """Serve the page and the pack."""
        import sys
        import webbrowser

        from d3pack.hub import local_path
        from d3pack.preview import viewer_address, viewer_directory, viewer_server

        file = local_path(self.pack)
        with viewer_server(file, viewer_directory(), self.port) as server:
            address = viewer_address(server, file)
            if self.format == "json":
                _out.emit({"address": address})
            else:
                _out.show(address)
            sys.stdout.flush()
            if self.format == "human":
                _out.say("Ctrl-C ends the page")
            if not self.no_open:
                webbrowser.open(address)
            with suppress(KeyboardInterrupt):
                server.serve_forever()
