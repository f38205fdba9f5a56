"""What was seen, layer by layer, for a person who debugs: begin at `view.py`."""
