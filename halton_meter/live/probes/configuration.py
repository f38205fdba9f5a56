"""What the configuration says while the worker runs: read again when somebody asks for it.

Root's choice comes from the supervisor, which alone may say which hosts are watched; the user's own
rules and prices are read here. What is wrong in either is kept for `status`. No file is read in
here: `live/pipeline.py` does, and `halton_meter/settings/values.py` judges the values.
"""

from __future__ import annotations

from typing import Any

from halton_meter.live.journal_writer import Condition
from halton_meter.live.pipeline import Pipeline
from halton_meter.live.probes.job import Job
from halton_meter.settings.config import SYSTEM_CONFIG


class Configuration:
    """The configuration as it is used. `error` has a line for each wrong value; None: all is right.

    Without a pipeline, and so in a single run, nothing is read again.
    """

    def __init__(self, job: Job, pipeline: Pipeline | None, condition: Condition) -> None:
        self.error = job.config_error
        self._own_hosts = job.own_hosts
        self._pipeline = pipeline
        self._condition = condition

    def take(self, told: dict[str, Any]) -> None:
        """Root has read the configuration again: other hosts are watched."""
        if self._pipeline is None:
            return
        self._pipeline.use_hosts(told["extra_hosts"])
        self._own_hosts = told["own_hosts"]
        self.reload()
        self.error = told["config_error"]

    def reload(self) -> dict[str, Any]:
        """Use the user's rules and prices as they are now, and what the client is to be told.

        Hosts are not taken from here: which of them are watched is root's to say.
        """
        if self._pipeline is None:
            return {"error": "a run reads the configuration once"}
        found = self._pipeline.reload()
        self._condition.price_error = self._pipeline.price_error
        of_root = [
            line for line in (self.error or "").split("\n") if line.startswith(str(SYSTEM_CONFIG))
        ]
        self.error = "\n".join((*of_root, *found.wrong)) or None
        hosts = found.config.extra_hosts
        return {
            "reloaded": True,
            "wrong": [*found.wrong],
            "notes": [*found.notes],
            "price_error": self._pipeline.price_error,
            "hosts_differ": hosts != self._own_hosts,
        }
