"""One line about what is spent, for Claude Code's status line and for a shell's prompt.

It is started every few seconds, so it must answer in less time than Python needs for our other
commands: it opens no database and imports nothing but `json` and `os`. What it shows stands in the
snapshot, a small file that whoever meters keeps (`live/snapshot_writer.py`). `snapshot.py` reads
that file, `line.py` makes the line, `quick.py` is the process; `settings.py` edits the client's
settings and is not part of the quick way.
"""
