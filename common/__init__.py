"""What the training scripts share: tasks, asset packs, environment, model, evaluation and files."""

import sys

if sys.platform != "linux":
    missing = "Linux's core masks and signals and Mesa's Vulkan are missing"
    raise ImportError(f"CleanVLA does not run on {sys.platform}: {missing}; use Linux or Docker")
