"""OpenAI, and what others speak of its API. Start at `routes.py`."""
