"""The exported formats, their checks, calibration, the manifest and the model card."""
