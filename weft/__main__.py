"""`python -m weft`: the command."""

from weft.cli.main import main

main()
