"""Google's Gemini. Start at `routes.py`."""
