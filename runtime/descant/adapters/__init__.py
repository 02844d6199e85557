"""Adapter work of the worker process: reading, checking, summing and storing adapters. Uses torch, never asyncio."""
