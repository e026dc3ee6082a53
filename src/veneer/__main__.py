"""``python -m veneer``."""

from veneer.cli.main import main

main()
