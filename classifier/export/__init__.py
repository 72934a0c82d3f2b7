"""Export: formats and their checks, quantization, calibration, the manifest and the model card."""
