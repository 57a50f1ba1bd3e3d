"""What the training scripts share: tasks, asset packs, environment, model, evaluation and files."""
