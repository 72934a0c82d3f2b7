"""From the files of annotate to batches on the device: dataset, loader, transforms, decoding."""
