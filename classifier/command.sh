#!/bin/sh
# The command `classifier`, which `make env` puts into .venv/bin. The project itself is not installed there: a stage that
# DVC runs in a copy of the repository must import the copy's code and find nothing else. Nor does it run (-P) what lies in
# the folder it is called in.
bin=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
exec "$bin/python" -P -c 'import sys
sys.path.insert(0, sys.argv.pop(1))
from classifier.cli.app import main
main()' "$(dirname -- "$(dirname -- "$bin")")" "$@"
