"""The fail-open listener that clients connect to. Standard library only."""
