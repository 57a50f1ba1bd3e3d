"""Eyes: OpenVLA's two vision transformers, and the small model's stem.
`fit` maps (N, H, W, 3) uint8 of any size to what the eyes take, and they that to image tokens
(N, P, width). Attribute names are the published checkpoint's keys, which are timm's."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from common.model.checkpoints import check

# DINOv2 ViT-L/14 with CLS and 4 registers, SigLIP SO400M/14:
# width, depth, heads, MLP width, tokens in front of the patches, mean and std of the pixels
TOWERS = {
    "featurizer": (1024, 24, 16, 4096, 5, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "fused_featurizer": (1152, 27, 16, 4304, 0, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}


class LayerScale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x * self.scale_factor


class MLP(nn.Module):
    """Linear layers fc1, fc2, ... with exact (erf) GELU between them."""

    def __init__(self, *widths):
        super().__init__()
        for i in range(1, len(widths)):
            setattr(self, f"fc{i}", nn.Linear(widths[i - 1], widths[i]))

    def forward(self, x):
        for i, layer in enumerate(self.children()):
            x = layer(F.gelu(x) if i else x)
        return x


class Block(nn.Module):
    def __init__(self, width, heads, mlp_width, layer_scale):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        qkv, proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.attn = nn.ModuleDict({"qkv": qkv, "proj": proj})
        self.mlp = MLP(width, mlp_width, width)
        self.ls1 = LayerScale(width) if layer_scale else nn.Identity()
        self.ls2 = LayerScale(width) if layer_scale else nn.Identity()

    def forward(self, x):
        x = x + self.ls1(self.attend(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))

    def attend(self, x):
        qkv = self.attn["qkv"](x).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (N, heads, S, head width)
        if x.device.type == "cpu":
            # the fused kernel's backward in bfloat16 takes four times as long there
            scores = q @ (k * k.shape[-1] ** -0.5).transpose(2, 3)
            x = scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v)
        return self.attn["proj"](x.transpose(1, 2).flatten(2))


class Tower(nn.Module):
    """A ViT up to the input of its last block, which is what OpenVLA reads: no final norm."""

    def __init__(self, image_size, width, depth, heads, mlp_width, prefix, mean, std):
        super().__init__()
        self.prefix, self.mean, self.std = prefix, mean, std
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, 14, stride=14)})
        self.pos_embed = nn.Parameter(torch.randn(1, (image_size // 14) ** 2, width) * 0.02)
        if prefix:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
            self.reg_token = nn.Parameter(torch.zeros(1, prefix - 1, width))
        block = (width, heads, mlp_width, prefix > 0)
        self.blocks = nn.ModuleList(Block(*block) for _ in range(depth - 1))

    def forward(self, images, recompute):
        mean, std = torch.tensor([self.mean, self.std]).to(images).view(2, 3, 1, 1)
        x = self.patch_embed["proj"]((images / 255 - mean) / std)
        x = x.flatten(2).transpose(1, 2) + self.pos_embed  # CLS and registers have no position
        if self.prefix:
            prefix = torch.cat([self.cls_token, self.reg_token], dim=1).expand(len(x), -1, -1)
            x = torch.cat([prefix, x], dim=1)
        for block in self.blocks:
            x = recompute(block, x)
        return x[:, self.prefix :]


class TwinTowers(nn.Module):
    """(N, 3, 224, 224) pixels 0..255 -> (N, 256, 2176): DINOv2 first, then SigLIP."""

    def __init__(self, config):
        super().__init__()
        self.size = (config.image_sizes[0], config.image_sizes[0])
        self.unread = []  # patterns of the published keys that no output depends on
        for name, default in TOWERS.items():
            sizes = (config.towers or {}).get(name, default[:4])
            setattr(self, name, Tower(self.size[0], *sizes, *default[4:]))
            last = rf"blocks\.{sizes[1] - 1}"
            self.unread.append(rf"vision_backbone\.{name}\.({last}|norm|attn_pool)\.")
        self.width = sum(tower.pos_embed.shape[2] for tower in self.children())
        self.inner = 4 * self.width  # of the projector

    def forward(self, images, recompute):
        return torch.cat([tower(images, recompute) for tower in self.children()], dim=-1)

    def fit(self, images, dtype):
        """RL4VLA's resize: bicubic in float32, aspect ratio ignored, overshoot kept; then dtype."""
        if images.is_floating_point() and images.shape[1:] == (3, *self.size):
            return images
        images = images.permute(0, 3, 1, 2).float()
        return F.interpolate(images, self.size, mode="bicubic", antialias=True).to(dtype)


class ConvStem(nn.Module):
    """The small model's eyes: convolutions, then a transformer in which every cell sees all."""

    def __init__(self, config):
        super().__init__()
        check(not hasattr(config, "crop"), "a small model of an earlier version; use another")
        self.size = cells = tuple(config.camera_size[::-1])  # height, width
        self.convs, self.unread, width = nn.ModuleList(), [], 3
        for channels, kernel, stride in config.stem:
            padding = (kernel - stride + 1) // 2
            self.convs.append(nn.Conv2d(width, channels, kernel, stride, padding))
            cells = [(side + 2 * padding - kernel) // stride + 1 for side in cells]
            width = channels
        tokens = math.prod(cells)
        self.width = self.inner = width
        # PyTorch's start shrinks the signal, and a position of 0.02 is not seen: both stop learning
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)
        self.pos_embed = nn.Parameter(torch.randn(1, tokens, width))
        heads, inner, depth = config.stem_blocks
        self.blocks = nn.ModuleList(Block(width, heads, inner, False) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, images, recompute):
        x = images.permute(0, 3, 1, 2).to(self.pos_embed.dtype) / 127.5 - 1
        for i, conv in enumerate(self.convs):
            x = conv(F.gelu(x) if i else x)
        x = x.flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x = recompute(block, x)
        return self.norm(x)

    def fit(self, images, dtype):
        """Pictures of the small scene, as they are; ValueError: others."""
        size, wanted = tuple(images.shape[1:]), (*self.size, 3)
        check(size == wanted, f"pictures are {size}, must be {wanted}; use --scene small")
        return images
