"""`d3pack verify`: every hash and every rule, and with --decode the images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from d3pack.cli import _out
from d3pack.cli._fields import Format, backbone_option, format_option
from d3pack.errors import BackboneError, D3MError, InvalidPackError
from d3pack.system import (
    argument,
    count,
    device_option,
    duration,
    option,
    printable,
    progress_bar,
)

if TYPE_CHECKING:
    from d3pack.decode import Decoder, ProbeReport
    from d3pack.format import Pack

Result = dict[str, Any]

_SHOWN = 5.0  # seconds: of what takes longer, the time and the progress are shown


@dataclass(frozen=True, slots=True)
class Verify:
    """Check every hash and every rule, and with --decode that this machine makes the same images.

    Exit 0: all valid; 3: one is not; 4: a backbone is missing or makes other images; 5: one does
    not exist.

    Example: d3pack verify flowers.d3m birds.d3m
    """

    packs: tuple[str, ...] = argument(".d3m files, or hf:// or s3:// addresses.")
    decode: bool = option(False, "Rebuild the probes as well and compare the images.")
    device: str | None = device_option()
    backbone: str | None = backbone_option()
    allow_long: bool = option(
        False, "Rebuild the probes even if it takes hours, or very much memory.", flag="--yes"
    )
    format: Format = format_option()

    def run(self) -> int:
        """Check one pack after the other; an invalid one outweighs one that does not exist."""
        results: list[Result] = []
        code = 0
        for file in self.packs:
            result, failed = self._checked(file)
            results.append(result)
            if result["valid"]:
                code = code or failed
            elif code != InvalidPackError.exit_code:
                code = failed
        if self.format == "json":
            _out.emit(results)
        elif self.format == "human":
            for result in results:
                _print(result)
        return code

    def _checked(self, file: str) -> tuple[Result, int]:
        from d3pack.format import carried_files
        from d3pack.hub import load

        try:
            pack = load(file)
            carried_files(pack)
        except D3MError as error:
            problem = {"valid": False, "code": error.code, "message": str(error)}
            return {"file": file, **problem}, error.exit_code
        result: Result = {"file": file, "valid": True, "root": pack.root}
        if not self.decode:
            return result, 0
        result["decode"], code = self._decoded(file, pack)
        return result, code

    def _decoded(self, file: str, pack: Pack) -> tuple[Result, int]:
        """The check of the images: a pack stays valid where it cannot be made."""
        from d3pack.decode import Decoder, check_probe_memory, local_backbone

        if self.format == "human" and pack.probes is not None:
            _out.say(f"rebuilding {count(len(pack.probes.images), 'probe')} of {file}")
        try:
            if pack.probes is not None and not self.allow_long:
                check_probe_memory(pack)
            path = self.backbone or local_backbone(file, pack)
            with Decoder(pack, device=self.device, path=path) as decoder:
                report = self._rebuilt(pack, decoder)
        except D3MError as error:
            return {"code": error.code, "message": str(error)}, error.exit_code
        wrong = report.verdict == "wrong backbone"
        return report.to_json(), BackboneError.exit_code if wrong else 0

    def _rebuilt(self, pack: Pack, decoder: Decoder) -> ProbeReport:
        """Say how long the probes take, where it is long, and rebuild them."""
        from d3pack.decode import check_probe_time, verify_probes

        seconds = check_probe_time(pack, decoder, allow_long=self.allow_long)
        quiet = self.format != "human"
        if seconds > _SHOWN and not quiet:
            _out.say(f"about {duration(seconds)} on this machine")
        with progress_bar("rebuilding", unit="steps", quiet=quiet or seconds <= _SHOWN) as bar:
            return verify_probes(pack, decoder, bar)


def _print(result: Result) -> None:
    name = printable(result["file"])
    if not result["valid"]:
        message = result["message"].replace(f"{result['file']!r}: ", "", 1)  # the name is there
        _out.say(f"refused  {name}  {message}")
        return
    print(f"valid    {name}  {result['root']}")
    decode = result.get("decode")
    if decode is None:
        return
    if "message" in decode:
        _out.say(f"not decoded  {name}  {decode['message']}")
    else:
        print(
            f"decodes  {name}  {decode['verdict']}: {count(decode['probes'], 'probe')}, "
            f"rms {decode['rms']}, peak {decode['peak']} of 255 levels"
        )
