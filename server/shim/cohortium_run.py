"""All the code that a run ships: a name for the ServerApp that is installed at the coordinator."""

from cohortium.server.app import app as _app

app = _app
