"""`python -m moe_runtime` is the command line."""

from moe_runtime.cli import main

main()
