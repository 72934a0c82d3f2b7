"""The training step, its state, checkpoints, optimisers, pretrained weights and inference."""
