"""The local web page: what was spent, by day, model and project. Read `server.py`."""
