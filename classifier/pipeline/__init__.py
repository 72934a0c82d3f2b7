"""What every stage uses: parameters, paths, outputs that appear whole, dvc.lock, errors, signals, tables."""
