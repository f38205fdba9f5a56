"""What looks into files that anybody may have made: runs as nobody, never as root."""
