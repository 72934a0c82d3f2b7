"""The stages of dvc.yaml, one module each with a `main()`. They exchange data through files alone.

`python -m stages train` runs a stage.
"""
