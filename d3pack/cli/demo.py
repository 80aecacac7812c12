"""`d3pack demo`: the whole product in a few minutes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from d3pack.cli import _out
from d3pack.cli._fields import Format, format_option
from d3pack.system import option


@dataclass(frozen=True, slots=True)
class Demo:
    """Encode real digits with the embedded backbone, and see what the pack is worth.

    Ends with a page that shows it, and photographs that a pack of CIFAR-10 makes. Needs no network
    and no GPU; takes a few minutes on two cores.

    Example: d3pack demo
    """

    output: Path = option(Path("d3pack-demo"), "Folder for pack, page and report.", short="-o")
    format: Format = format_option()

    def run(self) -> None:
        """Run the demo, step by step."""
        from contextlib import nullcontext

        from d3pack.demo import run_demo
        from d3pack.system import live_view

        _out.if_interrupted("run it again and it goes on")
        human = self.format == "human"
        demo = run_demo(
            self.output,
            view=live_view if human else lambda: nullcontext(lambda event: None),
            say=_out.say if human else lambda text: None,
        )
        if self.format == "json":
            _out.emit(demo.to_json())
        elif human:
            print(demo.sentence())
            page = (self.output / "index.html").resolve().as_uri()
            _out.say(f"{demo.seconds:.0f} s; look at {page}")
