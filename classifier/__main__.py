"""`python -m classifier` is the command line."""

from classifier.cli import main

main()
