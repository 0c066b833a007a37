"""`python -m nanhunt`."""

from nanhunt.cli import main

main()
