"""Live metering by the local proxy: the service and its worker."""
