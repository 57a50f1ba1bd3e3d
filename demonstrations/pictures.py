"""The pictures that a policy is cloned from: how they are kept, and random changes of them."""

import torch
import torch.nn.functional as F


def fit_to_uint8(model, images):
    """(N, H, W, 3) uint8 -> (N, h, w, 3) uint8 on the CPU, which `model.fit_images` only casts."""
    images = model.fit_images(images).cpu()
    if images.dtype == torch.uint8:
        return images
    return images.round().clamp(0, 255).byte().permute(0, 2, 3, 1)


def augment(images, generator):
    """Random crop of 90 to 100 % of the area, then brightness, saturation and contrast +-20 %.

    Args: images: (M, H, W, 3) uint8; generator: torch.Generator of the CPU. Returns: the same.
    """
    r = torch.rand(len(images), 6, generator=generator).to(images.device)
    side = (0.9 + 0.1 * r[:, 0]).sqrt()
    crop = torch.eye(2, 3, device=images.device) * side[:, None, None]
    crop[:, :, 2] = (2 * r[:, 1:3] - 1) * (1 - side)[:, None]
    x = images.permute(0, 3, 1, 2).float()
    grid = F.affine_grid(crop, x.shape, align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)

    brightness, saturation, contrast = (0.8 + 0.4 * r[:, 3:, None, None, None]).unbind(1)
    grey = brightness * x.mean(1, keepdim=True)
    x = grey + (brightness * x - grey) * saturation
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + (x - mean) * contrast
    return x.round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()
