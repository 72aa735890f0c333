# `flask` reads this file in development only, if python-dotenv is installed.
FLASK_APP={{ cookiecutter.project_slug }}
FLASK_DEBUG=1
{%- if cookiecutter.worker in ('procrastinate', 'celery') %}
FLASK_DEV_WITH=worker
{%- endif %}
{%- if cookiecutter.worker == 'celery' %}
# If a reload kills the worker, its jobs run again after this many seconds.
CELERY_VISIBILITY_TIMEOUT=15
{%- endif %}
