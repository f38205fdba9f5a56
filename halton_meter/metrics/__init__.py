"""The same figures as `report`, `plan` and `budget status`, in Prometheus's text format."""
