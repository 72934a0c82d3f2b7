"""The training loop, its state, checkpoints, optimisers, pretrained weights, and inference."""
