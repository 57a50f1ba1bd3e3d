"""Eyes of the model: OpenVLA's two vision transformers, the tiny model's convolutional stem, and how images are fitted.

Both kinds map fitted images to image tokens (N, patches, width); `fit` maps (N, H, W, 3) uint8 of any size to what they
take. Attribute names are the published checkpoint's keys (timm's names), so weights and LoRA adapters load one to one.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

# DINOv2 ViT-L/14 with 4 registers, SigLIP SO400M/14: width, depth, heads, MLP width, CLS + registers, pixel mean, std
TOWERS = {
    "featurizer": (1024, 24, 16, 4096, 5, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "fused_featurizer": (1152, 27, 16, 4304, 0, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


class LayerScale(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.scale_factor


class MLP(nn.Module):
    """Linear layers fc1, fc2, ... with exact (erf) GELU between them."""

    def __init__(self, *widths: int):
        super().__init__()
        for i in range(1, len(widths)):
            setattr(self, f"fc{i}", nn.Linear(widths[i - 1], widths[i]))

    def forward(self, x):
        first, *rest = self.children()
        x = first(x)
        for layer in rest:
            x = layer(F.gelu(x))
        return x


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = (
            self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )  # each (N, heads, S, head width)
        if x.device.type == "cpu":  # where the fused kernel's backward in bfloat16 takes four times as long
            x = (q @ (k * k.shape[-1] ** -0.5).transpose(2, 3)).softmax(-1, dtype=torch.float32).to(v.dtype) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp_width: int, layer_scale: bool):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn, self.mlp = Attention(width, heads), MLP(width, mlp_width, width)
        self.ls1, self.ls2 = (LayerScale(width) if layer_scale else nn.Identity() for _ in range(2))

    def forward(self, x):
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class Tower(nn.Module):
    """A ViT up to the input of its last block, which is what OpenVLA reads: no final norm, no prefix tokens."""

    def __init__(self, image_size, width, depth, heads, mlp_width, prefix, mean, std):
        super().__init__()
        self.prefix, self.mean, self.std = prefix, mean, std
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, 14, stride=14)})
        self.pos_embed = nn.Parameter(torch.randn(1, (image_size // 14) ** 2, width) * 0.02)  # patches only
        if prefix:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
            self.reg_token = nn.Parameter(torch.zeros(1, prefix - 1, width))
        self.blocks = nn.ModuleList(Block(width, heads, mlp_width, layer_scale=prefix > 0) for _ in range(depth - 1))

    def forward(self, images, recompute):
        mean, std = (torch.tensor(c).to(images).view(3, 1, 1) for c in (self.mean, self.std))
        x = self.patch_embed["proj"]((images / 255 - mean) / std).flatten(2).transpose(1, 2) + self.pos_embed
        if self.prefix:
            x = torch.cat([*(t.expand(len(x), -1, -1) for t in (self.cls_token, self.reg_token)), x], dim=1)
        for block in self.blocks:
            x = recompute(block, x)
        return x[:, self.prefix :]


class TwinTowers(nn.Module):
    """(N, 3, 224, 224) pixels 0..255 -> (N, 256, 2176): DINOv2 first, then SigLIP."""

    def __init__(self, config: dict):
        super().__init__()
        self.size = (config["image_sizes"][0],) * 2
        shapes = {name: config.get("towers", {}).get(name, default[:4]) for name, default in TOWERS.items()}
        self.width = sum(shape[0] for shape in shapes.values())
        self.inner = 4 * self.width  # of the projector
        for name, shape in shapes.items():
            setattr(self, name, Tower(self.size[0], *shape, *TOWERS[name][4:]))

    def forward(self, images, recompute):
        return torch.cat([tower(images, recompute) for tower in self.children()], dim=-1)

    def fit(self, images, dtype):
        """RL4VLA's resize: bicubic in float32 ignoring the aspect ratio, overshoot kept, then the model's dtype."""
        if images.is_floating_point() and images.shape[1:] == (3, *self.size):
            return images
        images = images.permute(0, 3, 1, 2).float()
        return F.interpolate(images, self.size, mode="bicubic", antialias=True, align_corners=False).to(dtype)


class ConvStem(nn.Module):
    """The tiny model's eyes: (N, H, W, 3) uint8 crop of the camera image -> one token per cell of `grid`: convolutions,
    then a transformer that sees all cells."""

    def __init__(self, config: dict):
        super().__init__()
        self.camera, (left, top, right, bottom) = config["camera_size"], config["crop"]
        self.window = slice(None), slice(top, bottom), slice(left, right)
        self.size = (bottom - top, right - left)
        stride = math.prod(stride for _, _, stride in config["stem"])
        self.grid = self.size[0] // stride, self.size[1] // stride  # rows and columns of image tokens
        channels = [3, *(c for c, _, _ in config["stem"])]
        self.convs = nn.ModuleList(
            nn.Conv2d(channels[i], c, kernel, stride, padding=(kernel - stride + 1) // 2)
            for i, (c, kernel, stride) in enumerate(config["stem"])
        )
        self.width = self.inner = channels[-1]
        for conv in self.convs:  # default starts shrink the signal; a position of 0.02 is not seen: both stop learning
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)
        self.pos_embed = nn.Parameter(torch.randn(1, math.prod(self.grid), self.width))
        heads, mlp_width, depth = config["stem_blocks"]
        self.blocks = nn.ModuleList(Block(self.width, heads, mlp_width, layer_scale=False) for _ in range(depth))
        self.norm = nn.LayerNorm(self.width, eps=1e-6)

    def forward(self, images, recompute):
        x = images.permute(0, 3, 1, 2).to(self.pos_embed.dtype) / 127.5 - 1
        for i, conv in enumerate(self.convs):
            x = conv(F.gelu(x) if i else x)
        x = x.flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x = recompute(block, x)
        return self.norm(x)

    def fit(self, images, dtype):
        """Crop, after a resize where the image is not of the camera's size; stays uint8."""
        if images.shape[1:] == (*self.size, 3):
            return images
        width, height = self.camera
        if images.shape[1:3] != (height, width):
            pixels = images.permute(0, 3, 1, 2).float()
            pixels = F.interpolate(pixels, (height, width), mode="bilinear", antialias=True, align_corners=False)
            images = pixels.round().to(torch.uint8).permute(0, 2, 3, 1)
        return images[self.window].contiguous()
