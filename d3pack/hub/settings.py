"""What a user chooses about `push`, and whom a user trusts in `pull`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from d3pack.errors import UsageError
from d3pack.system import check, device_option, option


@dataclass(frozen=True, slots=True)
class PushSettings:
    """What is published with a pack, and where."""

    licence: str | None = option(None, "Licence of the pack, such as cc-by-4.0.")
    source: str | None = option(None, "What the real images were, and their licence.")
    evaluation: Path | None = option(
        None, "evaluation.json of `d3pack eval`. [PACK.eval/]", flag="--eval"
    )
    preview: Literal["decode", "probes", "none"] = option("decode", "Images for the viewer.")
    preview_images: int | None = option(
        None, "Images of the preview. [40; 12 above 128 pixels]", ge=1
    )
    name: str | None = option(None, "Name of the file there. [as here]")
    sign: bool = option(False, "Sign the pack: with a key, else by a login at Sigstore.")
    key: Path | None = option(None, "Private key (PEM) to sign with.")
    private: bool = option(False, "The repository must be private; a new one is.")
    revision: str | None = option(None, "Branch to commit to. [main]")
    pr: bool = option(False, "Open a pull request instead.")
    replace_card: bool = option(False, "Replace a README.md that d3pack did not write.")
    backbone: Path | None = option(None, "Directory that holds the backbone, checked by its lock.")
    device: str | None = device_option()

    def __post_init__(self) -> None:
        check(self)
        if self.pr and self.revision not in (None, "main"):
            raise UsageError("a pull request goes to main", hint="give pr or a revision, not both")

    @property
    def signed(self) -> bool:
        """Whether the pack is signed: a key is enough."""
        return self.sign or self.key is not None


@dataclass(frozen=True, slots=True)
class Trust:
    """Who must have signed a pack: the holder of a key, or an identity that Sigstore confirms."""

    public_key: Path | None = option(None, "Public key (PEM) that must have signed.")
    identity: str | None = option(None, "Who must have signed, as Sigstore knows them.")
    issuer: str | None = option(None, "Who confirms that identity (URL).")
    required: bool = option(False, "Refuse a pack without a signature.", flag="--signed")

    def __post_init__(self) -> None:
        check(self)
        if (self.identity is None) != (self.issuer is None):
            raise UsageError("an identity and its issuer go together", hint="give both or none")
        if self.public_key is not None and self.identity is not None:
            raise UsageError("a key and an identity exclude each other", hint="give one of them")

    @property
    def names_signer(self) -> bool:
        """Whether it says who must have signed."""
        return self.public_key is not None or self.identity is not None
