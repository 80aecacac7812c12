"""`python -m d3pack`."""

from d3pack.cli import main

main()
