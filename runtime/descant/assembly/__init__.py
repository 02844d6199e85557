"""How the actors are put together into a system."""
