"""Between images and latents: an exact wavelet and a diffusers autoencoder. Neither normalises.

A codec gives raw latents; shift and scale, which make them model input, live in the manifest.

    codec = open_codec("haar1")
    assert (codec.decode(codec.encode(images)) == images).all()
"""

import hashlib
import re
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import DataError


class Codec(Protocol):
    """Images in, raw latents out, and back."""

    id: str  # such as haar1 or kl
    hash: str  # of the weights, or of the id where there are none
    source: str | None  # where the weights came from
    factor: int  # pixels per latent along a side
    dtype: str  # in which raw latents are stored
    posterior: bool  # encode gives mean and log-variance, one after the other in the channel axis

    def image_channels(self, given: int) -> int:
        """Channels that encode wants for a source with `given` (1 or 3)."""
        ...

    def channels(self, image_channels: int) -> int:
        """Channels of the latent that the model sees."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """images: (B, c, h, w) uint8 -> raw: (B, C or 2C, h/factor, w/factor) float32."""
        ...

    def decode(self, raw: Tensor) -> Tensor:
        """raw: (B, C, H, W) -> images: (B, c, h, w) uint8."""
        ...

    def normalisation(self, mean: np.ndarray, std: np.ndarray) -> tuple[list[float], list[float]]:
        """(shift, scale), C numbers each, from the mean and std of the training latents.

        A codec whose numbers do not come with weights gives none where there is no mean and std.
        """
        ...


def _haar_step(x: Tensor) -> Tensor:
    """One level: (B, C, H, W) -> (B, 4C, H/2, W/2), bands in the order LL, LH, HL, HH."""
    a, b = x[..., 0::2, 0::2], x[..., 0::2, 1::2]
    c, d = x[..., 1::2, 0::2], x[..., 1::2, 1::2]
    bands = (a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d)
    return torch.cat(bands, 1) / 2


def _haar_inverse(y: Tensor) -> Tensor:
    """One level back: (B, 4C, H, W) -> (B, C, 2H, 2W). The matrix is its own inverse."""
    a, b, c, d = y.chunk(4, 1)
    x = y.new_empty(len(y), a.shape[1], 2 * y.shape[2], 2 * y.shape[3])
    x[..., 0::2, 0::2] = (a + b + c + d) / 2
    x[..., 0::2, 1::2] = (a - b + c - d) / 2
    x[..., 1::2, 0::2] = (a + b - c - d) / 2
    x[..., 1::2, 1::2] = (a - b - c + d) / 2
    return x


class Haar:
    """Orthonormal 2-D Haar wavelet, every band split again at each level. Exact, no weights.

    Source: Haar 1910. A pixel u becomes (u - 127.5) / 128, an odd number of 256ths.
    """

    source = None
    posterior = False

    def __init__(self, levels: int) -> None:
        self.levels = levels
        self.id = f"haar{levels}"
        self.hash = hashlib.sha256(f"{self.id}/1".encode()).hexdigest()
        self.factor = 2**levels
        # why: after k levels a value is an even number up to 255 * 4^k, over 256 * 2^k. Halved,
        # it is at most 2040 for k = 2, in the 11 bits of a float16, and 8160 for k = 3, outside.
        self.dtype = "float16" if levels <= 2 else "float32"

    def image_channels(self, given: int) -> int:
        return given

    def channels(self, image_channels: int) -> int:
        return image_channels * 4**self.levels

    def encode(self, images: Tensor) -> Tensor:
        x = (images.float() - 127.5) / 128
        for _ in range(self.levels):
            x = _haar_step(x)
        return x

    def decode(self, raw: Tensor) -> Tensor:
        x = raw.float()
        for _ in range(self.levels):
            x = _haar_inverse(x)
        return (x * 128 + 127.5).round().clamp(0, 255).to(torch.uint8)

    def normalisation(self, mean: np.ndarray, std: np.ndarray) -> tuple[list[float], list[float]]:
        # why: one scale for all bands. The transform is orthonormal, so noise is then the same in
        # latents and in pixels; a scale a band would spend the loss on faint detail.
        spread = float(np.sqrt(np.mean(np.square(std)))) if len(std) else 1.0
        return mean.tolist(), [1 / spread if spread > 0 else 1.0] * len(std)


class KL:
    """A diffusers AutoencoderKL. Stores the posterior, so that x is drawn afresh each time.

    Source: Rombach et al. 2022, Sec. 3.1; the numbers for shift and scale come with the weights.
    """

    id = "kl"
    dtype = "float16"
    posterior = True

    def __init__(self, source: str, device: torch.device | str) -> None:
        self.source: str | None = source
        self.device = torch.device(device)
        self.vae = _load_vae(source).to(self.device, torch.float32).eval().requires_grad_(False)
        self.hash = _weights_hash(self.vae)
        self.factor = 2 ** (len(self.vae.config.block_out_channels) - 1)

    def image_channels(self, given: int) -> int:
        want = self.vae.config.in_channels
        if given not in (1, want):
            raise DataError(
                f"the images have {given} channels, the autoencoder '{self.source}' wants {want}; "
                f"choose another --vae or --codec haar."
            )
        return want

    def channels(self, image_channels: int) -> int:
        return self.vae.config.latent_channels

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        x = images.to(self.device).float() / 127.5 - 1
        posterior = self.vae.encode(x).latent_dist
        return torch.cat([posterior.mean, posterior.logvar], 1).cpu()

    @torch.inference_mode()
    def decode(self, raw: Tensor) -> Tensor:
        pixels = self.vae.decode(raw.to(self.device, torch.float32)).sample
        return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()

    def normalisation(self, mean: np.ndarray, std: np.ndarray) -> tuple[list[float], list[float]]:
        config = self.vae.config
        channels = config.latent_channels
        factor = float(config.scaling_factor)
        # why: newer weights come with numbers per channel, which replace the single shift
        if config.get("latents_mean") is not None and config.get("latents_std") is not None:
            return list(config.latents_mean), [factor / s for s in config.latents_std]
        return [float(config.get("shift_factor") or 0.0)] * channels, [factor] * channels


def _load_vae(source: str) -> Any:
    """An AutoencoderKL from a directory (or its `vae` folder) or a hub id."""
    from diffusers import AutoencoderKL  # why: seconds to import, and only this codec needs it

    folder = "vae" if (Path(source) / "vae" / "config.json").is_file() else ""
    try:
        # why: only safetensors, because other weight files are unpickled
        return AutoencoderKL.from_pretrained(source, subfolder=folder, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise DataError(
            f"no AutoencoderKL could be loaded from --vae '{source}' ({error}); give a directory "
            f"written by save_pretrained or a hub id."
        ) from error


def _weights_hash(module: torch.nn.Module) -> str:
    """SHA-256 over the names, shapes and values of all weights."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def codec_id(name: str) -> str:
    """The id a codec name stands for: `haar` is `haar1`."""
    return "haar1" if name == "haar" else name


def open_codec(name: str, vae: str | None = None, device: torch.device | str = "cpu") -> Codec:
    """The codec of this name; `vae` is the directory or hub id of the weights of `kl`.

    Raises DataError for an unknown name, or when weights are missing or given for nothing.
    """
    wavelet = re.fullmatch(r"haar([1-4])", codec_id(name))
    if wavelet is None and name != "kl":
        raise DataError(f"codec '{name}' is unknown; choose haar, haar1 to haar4, or kl.")
    if wavelet is not None:
        if vae is not None:
            raise DataError(f"codec '{name}' has no weights, but vae='{vae}' was given; drop it.")
        return Haar(int(wavelet[1]))
    if vae is None:
        raise DataError("codec 'kl' needs weights: give --vae DIRECTORY or a hub id.")
    return KL(vae, device)
