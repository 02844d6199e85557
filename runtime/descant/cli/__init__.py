"""The command line. Importing it needs no torch and, of the server's other dependencies, only platformdirs."""

from descant.cli.app import main

__all__ = ["main"]
