"""`d3pack view`: a pack in the browser."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from d3pack.cli import _out
from d3pack.cli._fields import Format, format_option, pack_argument
from d3pack.system import option


@dataclass(frozen=True, slots=True)
class View:
    """Open a page that verifies the pack and rebuilds its images in the browser.

    The page is served on this machine until Ctrl-C.

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

        from d3pack.preview import (
            viewer_address,
            viewer_directory,
            viewer_networks,
            viewer_server,
        )

        with (
            _local_file(self.pack) as file,
            viewer_server(
                file, viewer_directory(), self.port, networks=viewer_networks()
            ) as server,
        ):
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


@contextmanager
def _local_file(pack: str) -> Iterator[Path]:
    """Yield the file of a pack; one from elsewhere lies in a directory that is then removed."""
    import tempfile

    from d3pack.errors import NotFoundError, UsageError
    from d3pack.format import write
    from d3pack.hub import is_remote, load_named

    if not is_remote(pack):
        if not Path(pack).exists():
            raise NotFoundError(f"there is no file {pack}")
        if not Path(pack).is_file():
            raise UsageError(f"{pack} is not a regular file", hint="give a .d3m file")
        yield Path(pack)
        return
    name, loaded = load_named(pack)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / Path(name).name
        write(loaded, file)
        yield file
