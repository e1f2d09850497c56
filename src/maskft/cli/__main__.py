"""`python -m maskft.cli`, the same as the `maskft` script."""

from maskft.cli import main

main()
