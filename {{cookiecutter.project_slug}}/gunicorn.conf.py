"""How gunicorn serves the application: it reads this file where it is started.

PORT in the environment makes it listen on that port of every network, WEB_CONCURRENCY
is the number of processes, and GUNICORN_CMD_ARGS, such as "--bind :80 --threads 4", has
the last word on https://docs.gunicorn.org/en/stable/settings.html.
"""

import os

wsgi_app = "{{ cookiecutter.project_slug }}:create_app()"

# Processes, and how many requests each of them answers at once.
workers = int(os.environ.get("WEB_CONCURRENCY", 2))
threads = 8

# The application is created before the processes are forked, so what is wrong with the
# settings is said once. Connections and threads belong to the process that uses them.
preload_app = True

# Seconds for the requests that have begun when SIGTERM comes.
graceful_timeout = 30

# A process is replaced after so many requests, in case that something leaks memory.
max_requests = 10_000
max_requests_jitter = 1_000

# TRUSTED_PROXIES in the environment says whom to believe, on any server.
forwarded_allow_ips = ""

# The application logs its requests; and two gunicorns would share one control socket.
accesslog = None
control_socket_disable = True
{%- if cookiecutter.pool != 'none' %}


def when_ready(server):
    """Say so when there are more threads than connections for them."""
    size = server.app.wsgi().config["POOL_SIZE"]
    if server.cfg.threads > size:
        message = "%d threads share %d connections: raise POOL_SIZE or lower threads."
        server.log.warning(message, server.cfg.threads, size)
{%- endif %}
