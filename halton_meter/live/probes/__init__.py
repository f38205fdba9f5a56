"""Live metering by uprobes: the service, its supervisor and its worker."""
