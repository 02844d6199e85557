"""Requests checked, prepared and submitted, whichever door they came through."""
