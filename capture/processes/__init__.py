"""Who a process is: /proc, and command lines cut to what may be kept."""
