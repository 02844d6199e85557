"""Checking, preparation and submission of requests, independent of the protocol that carries them."""
