"""DiT with the time frequencies it was published with, as a diffusers model.

Goes along with exported weights; nothing of the training program is needed, nor imports this.

    model = diffusers.AutoModel.from_pretrained(DIRECTORY, trust_remote_code=True)
"""

import functools
from typing import Any

from diffusers.models.embeddings import Timesteps
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel


class PublishedDiT(DiTTransformer2DModel):
    """DiTTransformer2DModel with frequencies 10000^(-i/128), where diffusers has 10000^(-i/127)."""

    # why: wrapped, because diffusers reads the names of the settings from this signature.
    @functools.wraps(DiTTransformer2DModel.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for block in self.transformer_blocks:
            norm: Any = block.norm1
            norm.emb.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
