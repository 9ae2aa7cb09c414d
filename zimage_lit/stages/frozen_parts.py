"""What a stage asks of its frozen parts before it trains with what they made."""

from typing import Any

from zimage_lit.components import LatentCodec, TextEncoder
from zimage_lit.errors import UserError


def check_encoded_by(datamodule: Any, codec: LatentCodec, text_encoder: TextEncoder) -> None:
    """UserError where the data hold latents or features that this codec or text encoder would not have made.

    `datamodule` may have `encoded_by`: "codec" and "text_encoder" -> fingerprint of the one that was used.
    """
    known: dict[str, str] = getattr(datamodule, "encoded_by", {})
    parts: dict[str, LatentCodec | TextEncoder] = {"codec": codec, "text_encoder": text_encoder}
    for name, part in parts.items():
        if name in known and known[name] != part.fingerprint():
            made = "latents" if name == "codec" else "caption features"
            raise UserError(
                f"The data hold {made} of another {name} than model.init_args.{name}: name the one that they were made "
                "with, or run `encode` again with this one."
            )
