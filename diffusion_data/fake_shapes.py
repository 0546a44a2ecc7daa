"""What a model takes, as its config tells -> shapes of fake latents for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffusion_data.errors import UserError

_NAMES = ("in_channels", "patch_spatial", "crossattn_emb_size", "max_frames", "max_img_h", "max_img_w")
_ANY = 2**31


@dataclass(frozen=True, kw_only=True)
class ModelInput:
    """Defaults: latents of Cosmos tokenizers, texts of T5-11B, any size."""

    channels: int = 16
    patch_spatial: int | None = None
    """None: the task encoder's."""
    text_embedding_dim: int = 1024
    largest: tuple[int, int, int] = (_ANY, _ANY, _ANY)
    """(T, H, W) of a latent."""

    @classmethod
    def of(cls, model_config: Any) -> ModelInput:
        """model_config: NeMo's DiTConfig, or anything with the same six attributes; None for the defaults.

        Raises:
            UserError: an attribute is missing, or isn't a whole number above 0.
        """
        if model_config is None:
            return cls()
        values = dict.fromkeys(_NAMES, 0)
        for name in _NAMES:
            value = getattr(model_config, name, None)
            if not isinstance(value, int) or value < 1:
                raise UserError(
                    f"model_config must have {', '.join(_NAMES)}, whole numbers above 0, as NeMo's DiTConfig has; "
                    f"{name} of this {type(model_config).__name__} is {value}"
                )
            values[name] = value
        return cls(
            channels=values["in_channels"],
            patch_spatial=values["patch_spatial"],
            text_embedding_dim=values["crossattn_emb_size"],
            largest=(values["max_frames"], values["max_img_h"], values["max_img_w"]),
        )

    def shapes_that_fit(self, most_patches: int, patch_spatial: int, patch_temporal: int) -> list[tuple[int, ...]]:
        """A square picture, one twice as wide as high, and a square clip of 5 latent frames, as large as can be."""
        frames, rows, columns = (
            most // size
            for most, size in zip(self.largest, (patch_temporal, patch_spatial, patch_spatial), strict=True)
        )

        def shape(clip_frames: int, aspect: int) -> tuple[int, ...]:
            count = min(clip_frames, frames)
            height = min(math.isqrt(most_patches // (count * aspect)), rows, columns // aspect) if count else 0
            return (
                self.channels,
                count * patch_temporal,
                height * patch_spatial,
                height * aspect * patch_spatial,
            )

        shapes = [shape(1, 1), shape(1, 2), shape(5, 1)]
        return [each for each in dict.fromkeys(shapes) if min(each) > 0]

    def refuse_unfit(self, shapes: Sequence[Sequence[int]]) -> None:
        """Raises UserError: a model with this config doesn't take one of these (C, T, H, W)."""
        for channels, *sizes in shapes:
            if channels != self.channels or any(size > most for size, most in zip(sizes, self.largest, strict=True)):
                raise UserError(
                    f"latent_shapes has {(channels, *sizes)}, but model_config tells of {self.channels} channels and "
                    f"latents of at most {self.largest} (T, H, W)"
                )
