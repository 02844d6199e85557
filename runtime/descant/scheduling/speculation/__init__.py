"""Drafts: where they come from, and how many tokens are worth verifying."""
