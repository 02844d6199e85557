"""Requests, checked, prepared and submitted. Used by every door; knows of none."""
