"""What providers' readers share: bodies, errors, values, and the draft of an event."""
