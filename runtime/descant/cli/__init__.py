"""The command line. Importing it needs neither torch nor the server's other dependencies."""

from descant.cli.app import main

__all__ = ["main"]
