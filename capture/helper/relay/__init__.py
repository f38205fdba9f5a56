"""From the kernel's ring to the reader's socket, across deaths of either end."""
