"""Descant: one base model in any number of voices. Importing this package imports nothing heavy."""

__version__ = "0.1.0"
