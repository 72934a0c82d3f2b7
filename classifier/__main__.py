"""`python -m classifier` is the command line."""

from classifier.cli.app import main

main()
