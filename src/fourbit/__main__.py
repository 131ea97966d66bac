"""``python -m fourbit``."""

from fourbit.cli import main

main()
