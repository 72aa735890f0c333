"""The machinery of the project: settings, connections, jobs, log, security."""
